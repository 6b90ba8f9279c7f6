package engine_test

import (
	"fmt"
	"strings"
)

// A chart draws lines as SVG.
type chart struct {
	title, x, y      string
	left, right, top float64 // of the axes; the bottom is 0
	lines            []line
}

type line struct {
	name, color string
	xy          [][2]float64
}

// add adds a line. The chart shows the part between its left and right axes.
func (c *chart) add(name, color string, xy [][2]float64) {
	c.lines = append(c.lines, line{name, color, xy})
}

func (c *chart) svg() string {
	const width, height, x0, y0, w, h = 760, 400, 50, 340, 690, 290
	at := func(x, y float64) (float64, float64) {
		return x0 + w*(x-c.left)/(c.right-c.left), y0 - h*min(y/c.top, 1)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"12\">\n", width, height)
	fmt.Fprintf(&b, "<title>%s</title>\n<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n", c.title, width, height)
	fmt.Fprintf(&b, "<text x=\"%d\" y=\"24\" font-size=\"14\">%s</text>\n", x0, c.title)
	for y := 0.0; y <= c.top; y += 10 {
		_, py := at(0, y)
		fmt.Fprintf(&b, "<path d=\"M%d %.1fh%d\" stroke=\"#dddddd\"/><text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%v</text>\n", x0, py, w, x0-6, py+4, y)
	}
	for x := c.left; x <= c.right; x += 2 {
		px, _ := at(x, 0)
		fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%v</text>\n", px, y0+18, x)
	}
	fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text><text x=\"8\" y=\"%d\">%s</text>\n", x0+w, y0+34, c.x, y0-h-12, c.y)
	for i, l := range c.lines {
		var points []string
		for _, p := range l.xy {
			if p[0] >= c.left && p[0] <= c.right {
				px, py := at(p[0], p[1])
				points = append(points, fmt.Sprintf("%.1f,%.1f", px, py))
			}
		}
		fmt.Fprintf(&b, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.5\" points=\"%s\"/>\n", l.color, strings.Join(points, " "))
		fmt.Fprintf(&b, "<rect x=\"%d\" y=\"%d\" width=\"14\" height=\"3\" fill=\"%s\"/><text x=\"%d\" y=\"%d\">%s</text>\n", x0+i*170, height-14, l.color, x0+i*170+20, height-9, l.name)
	}
	b.WriteString("</svg>\n")
	return b.String()
}
