package policy

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Bounds of what is read. Each is on something that the YAML library takes quadratic time or memory in, or that its
// stack grows with; what fits takes about a second at worst. There is room for 250 limiters, and for a limiter that
// lists 9,000 tenants.
const (
	maxSize   = 1 << 20 // bytes of a file
	maxBlank  = 200     // line breaks in a row
	maxTabs   = 64      // tabs in a line
	maxLess   = 64      // "<" in a row
	maxTokens = 20_000  // tokens of a file, and values of a document once its aliases are expanded
	textValue = 128     // bytes of text that count for another of these values, where an alias stands for it
	maxDepth  = 64      // mappings and sequences in each other
	maxKey    = 256     // bytes of a key
)

// kind is what a node is; it reads as in "want a string, have a number".
type kind string

const (
	null     kind = "nothing"
	boolean  kind = "a boolean"
	number   kind = "a number"
	text     kind = "a string"
	sequence kind = "a sequence"
	mapping  kind = "a mapping"
)

// A node is a value of a YAML document. Aliases share the node that they stand for, so nodes do not change.
type node struct {
	kind         kind
	line, column int
	text         string  // of text
	number       float64 // of number
	truth        bool    // of boolean
	items        []*node // of sequence
	entries      []entry // of mapping, in the file's order; keys are unique
	size         int     // values in it and below, aliases expanded, and what long text counts for
}

type entry struct {
	key          string
	line, column int // of the key
	value        *node
}

// readYAML returns the documents of a file that are not empty and not broken.
func readYAML(file string, data []byte) (docs []*node, errs []*Error) {
	fail := func(line, column int, message string) {
		errs = append(errs, &Error{File: file, Line: max(line, 1), Column: max(column, 1), Message: printable(clip(message, 200))})
	}
	source := strings.TrimPrefix(string(data), "\ufeff")
	if line, column, problem := checkSource(source); problem != "" {
		fail(line, column, problem)
		return nil, errs
	}
	var tokens token.Tokens
	if err := safely(func() error { tokens = lexer.Tokenize(source); return nil }); err != nil {
		fail(1, 1, err.Error())
		return nil, errs
	}
	if len(tokens) > maxTokens {
		fail(1, 1, fmt.Sprintf("holds more than %d YAML tokens; split it into several policies", maxTokens))
		return nil, errs
	}
	for _, part := range split(tokens) {
		if at, problem := checkTokens(part); problem != "" {
			fail(at.Position.Line, at.Position.Column, problem)
			continue
		}
		if at, problem := checkText(part); problem != "" {
			fail(at.Position.Line, at.Position.Column, problem)
			continue
		}
		var parsed *ast.File
		err := safely(func() (err error) {
			parsed, err = parser.Parse(part, 0, parser.AllowDuplicateMapKey()) // the converter finds those
			return err
		})
		if err != nil {
			at, message := part[0], "bad YAML"
			// This is the library's yaml.Error, without linking its decoder. What Error returns is a page of source.
			var where interface {
				GetToken() *token.Token
				GetMessage() string
			}
			if errors.As(err, &where) {
				message += ": " + where.GetMessage()
				if strings.Contains(message, "'\t'") {
					message += "; indent with spaces"
				}
				if tk := where.GetToken(); tk != nil && tk.Position != nil {
					at = tk
				}
			}
			fail(at.Position.Line, at.Position.Column, message)
			continue
		}
		for _, doc := range parsed.Docs {
			if doc.Body == nil {
				continue
			}
			c := converter{fail: fail, anchors: map[string]*node{}, left: maxTokens}
			if n := c.node(doc.Body); !c.failed && n.kind != null {
				docs = append(docs, n)
			}
		}
	}
	return docs, errs
}

// safely turns a panic of the YAML library into an error. Fuzzing finds none in the version that we use, but releases
// before and after it have had some on broken input (goccy/go-yaml issues 479, 718, 890), and a file must not end a
// process that reads it again while it runs.
func safely(call func() error) (err error) {
	defer func() {
		if recover() != nil {
			err = errors.New("bad YAML")
		}
	}()
	return call()
}

// checkSource refuses text that would take the lexer too long, or that is none.
func checkSource(source string) (line, column int, problem string) {
	if len(source) > maxSize {
		return 1, 1, fmt.Sprintf("is larger than %d MiB; split it into several policies", maxSize>>20)
	}
	line = 1
	blank, tabs, less := 0, 0, 0
	for i, r := range source {
		column++
		if r != '<' {
			less = 0
		}
		switch r {
		case '\uFFFD':
			if !strings.HasPrefix(source[i:], "\uFFFD") {
				return line, column, "is not UTF-8"
			}
			blank = 0
		case '\n', '\r':
			blank, tabs = blank+1, 0
		case '\t':
			tabs++
		case ' ':
		case '<':
			less++
			blank = 0
		default:
			blank = 0
		}
		switch {
		case blank > maxBlank:
			return line, column, fmt.Sprintf("has more than %d blank lines in a row; remove some", maxBlank)
		case tabs > maxTabs:
			return line, column, fmt.Sprintf(`has more than %d tabs in a line; use spaces, or \t in double quotes`, maxTabs)
		case less > maxLess:
			return line, column, fmt.Sprintf(`has more than %d "<" in a row; remove some`, maxLess)
		}
		if r == '\n' {
			line, column = line+1, 0
		}
	}
	return 0, 0, ""
}

// split cuts tokens into documents. The parser does it too, but drops what follows an empty document and mixes up the
// tokens around "...".
func split(tokens token.Tokens) []token.Tokens {
	var docs []token.Tokens
	start := 0
	for i := 0; i <= len(tokens); i++ {
		if i < len(tokens) && tokens[i].Type != token.DocumentHeaderType && tokens[i].Type != token.DocumentEndType {
			continue
		}
		if i > start {
			docs = append(docs, tokens[start:i:i])
		}
		start = i + 1
	}
	return docs
}

// checkTokens refuses a document that would take the parser too long, and YAML that policies have no use for.
func checkTokens(tokens token.Tokens) (at *token.Token, problem string) {
	flow, dashes := 0, 0 // brackets around the token, and entries of block sequences in a row within them
	var columns []int    // of the block collections around the token, outermost first; a lower bound of their number
	block := func(column int) {
		for len(columns) > 0 && columns[len(columns)-1] > column {
			columns = columns[:len(columns)-1]
		}
		if len(columns) == 0 || columns[len(columns)-1] < column {
			columns = append(columns, column)
		}
	}
	for i, tk := range tokens {
		if tk.Type != token.SequenceEntryType {
			dashes = 0
		}
		switch tk.Type {
		case token.TagType:
			return tk, "YAML tags are not supported"
		case token.DirectiveType:
			return tk, "YAML directives are not supported"
		case token.MappingKeyType:
			return tk, `YAML keys introduced by "?" are not supported`
		case token.MappingStartType, token.SequenceStartType:
			flow++
		case token.MappingEndType, token.SequenceEndType:
			flow = max(flow-1, 0)
		case token.SequenceEntryType:
			if flow == 0 {
				block(tk.Position.Column)
			} else {
				dashes++
			}
		case token.MappingValueType:
			key := tokens[max(i-1, 0)]
			if len(key.Value) > maxKey {
				return key, fmt.Sprintf("has a key longer than %d bytes", maxKey)
			}
			if flow == 0 {
				block(key.Position.Column)
			}
		}
		if len(columns)+flow+dashes > maxDepth {
			return tk, fmt.Sprintf("is nested more than %d levels deep", maxDepth)
		}
	}
	return nil, ""
}

// checkText refuses text that the lexer reads as something else than it says. The lexer takes a colon behind a missing
// comma for text, drops tabs that are not quoted, and for each tab between double quotes drops a character behind them.
func checkText(tokens token.Tokens) (at *token.Token, problem string) {
	block := false // the next text is that of a block scalar
	for _, tk := range tokens {
		plain := tk.CharacterType == token.CharacterTypeMiscellaneous && !block
		switch {
		case tk.Type == token.InvalidType: // the parser tells why, and what follows is garbled
			return nil, ""
		case (plain || tk.Type == token.DoubleQuoteType) && strings.Contains(strings.TrimSpace(tk.Origin), "\t"):
			return tk, `tab in text; write \t in double quotes`
		case plain && strings.Contains(strings.ReplaceAll(tk.Value, "\n", " ")+" ", ": "):
			return tk, "colon in unquoted text; is a comma missing? If not, quote the text"
		}
		if tk.Type != token.CommentType {
			block = tk.Type == token.LiteralType || tk.Type == token.FoldedType
		}
	}
	return nil, ""
}

// A converter turns the library's syntax tree of a document into nodes.
type converter struct {
	fail    func(line, column int, message string)
	failed  bool
	anchors map[string]*node
	left    int // values that may still be made
}

func (c *converter) node(in ast.Node) *node {
	pos := in.GetToken().Position
	n := &node{line: pos.Line, column: pos.Column, size: 1}
	switch in := in.(type) {
	case *ast.NullNode:
		n.kind = null
	case *ast.BoolNode:
		n.kind, n.truth = boolean, in.Value
	case *ast.IntegerNode:
		n.kind = number
		switch i := in.Value.(type) {
		case int64:
			n.number = float64(i)
		case uint64:
			n.number = float64(i)
		}
	case *ast.FloatNode:
		n.kind, n.number = number, in.Value
	case *ast.InfinityNode:
		n.kind, n.number = number, in.Value
	case *ast.NanNode:
		n.kind, n.number = number, math.NaN()
	case *ast.StringNode:
		n.kind, n.text = text, in.Value
		// The library takes 1e3 and numbers beyond 64 bits for strings.
		if in.Token.Type == token.StringType && in.Value != "" && strings.ContainsRune("+-.0123456789", rune(in.Value[0])) {
			if f, err := strconv.ParseFloat(in.Value, 64); err == nil || errors.Is(err, strconv.ErrRange) {
				n.kind, n.number = number, f
			}
		}
	case *ast.LiteralNode:
		n.kind, n.text = text, in.Value.Value
	case *ast.SequenceNode:
		n.kind = sequence
		for _, value := range in.Values {
			item := c.node(value)
			n.items = append(n.items, item)
			n.size += item.size
		}
	case *ast.MappingNode:
		c.mapping(n, in)
	case *ast.AnchorNode:
		value := c.node(in.Value)
		c.anchors[in.Name.GetToken().Value] = value
		return value
	case *ast.AliasNode:
		name := in.Value.GetToken().Value
		target, ok := c.anchors[name]
		if !ok {
			c.failf(pos, "unknown alias %s", quote(name))
			return n
		}
		return c.spend(target, pos)
	default:
		c.failf(pos, "%s is not supported here", in.Type())
	}
	n.size += len(n.text) / textValue // for what an alias multiplies is work too: a regular expression to compile
	c.left--
	return n
}

// spend takes an alias's target from what is left, so that a few lines of aliases of aliases cannot stand for more
// values than memory or patience holds.
func (c *converter) spend(target *node, pos *token.Position) *node {
	if c.left >= 0 && c.left < target.size {
		c.failf(pos, "aliases stand for more than %d values", maxTokens)
	}
	if c.left -= target.size; c.left < 0 {
		return &node{kind: null, size: 1}
	}
	return target
}

func (c *converter) mapping(n *node, in *ast.MappingNode) {
	n.kind = mapping
	index := map[string]int{}
	var merged []*node
	for i, pair := range in.Values {
		tk := pair.Key.GetToken()
		if i == 0 && !in.IsFlowStyle {
			n.line, n.column = tk.Position.Line, tk.Position.Column // the library says where the colon is
		}
		value := c.node(pair.Value)
		n.size += value.size
		switch key := pair.Key.(type) {
		case *ast.MergeKeyNode:
			if value.kind == sequence {
				merged = append(merged, value.items...)
			} else {
				merged = append(merged, value)
			}
			continue
		case *ast.StringNode, *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.NullNode:
			if first, ok := index[tk.Value]; ok {
				// The rest of the document still makes sense, so this does not fail it.
				c.fail(tk.Position.Line, tk.Position.Column,
					fmt.Sprintf("duplicate key %s, first at line %d", quote(tk.Value), n.entries[first].line))
				continue
			}
		default:
			c.failf(tk.Position, "want a plain key, have %s", key.Type())
			continue
		}
		index[tk.Value] = len(n.entries)
		n.entries = append(n.entries, entry{key: tk.Value, line: tk.Position.Line, column: tk.Position.Column, value: value})
	}
	// The mapping's own keys win over merged ones, and earlier merged mappings over later ones.
	for _, from := range merged {
		if from.kind != mapping {
			c.failf(&token.Position{Line: from.line, Column: from.column}, "want a mapping to merge, have %s", from.kind)
			continue
		}
		for _, e := range from.entries {
			if _, ok := index[e.key]; !ok {
				index[e.key] = len(n.entries)
				n.entries = append(n.entries, e)
			}
		}
	}
}

func (c *converter) failf(pos *token.Position, format string, args ...any) {
	c.failed = true
	c.fail(pos.Line, pos.Column, fmt.Sprintf(format, args...))
}
