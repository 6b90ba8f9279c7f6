package labels

import (
	"context"
	"fmt"
	"io"
	"maps"
)

type contextKey struct{}

// layers is what a context carries. It is never changed.
type layers struct {
	explicit, transport map[string]string
	err                 error // the first problem of With
}

// labelled is a context with labels: one object, where context.WithValue would make two. Package fmt calls no method of
// what is in an unexported field, as a request's context is, and shows what a pointer there leads to. So the labels are
// behind one more pointer, into the same object.
type labelled struct {
	context.Context
	layers *layers
}

func newLabelled(ctx context.Context, l layers) context.Context {
	all := &struct {
		labelled
		layers layers
	}{layers: l}
	all.labelled = labelled{ctx, &all.layers}
	return &all.labelled
}

func (c *labelled) Value(key any) any {
	if key == (contextKey{}) {
		return c.layers
	}
	return c.Context.Value(key)
}

// Format keeps the labels out of what is printed, whatever the verb.
func (c *labelled) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) }

// String is for the contexts derived from it, which print what they come from.
func (c *labelled) String() string { return "labels.Context" }

func layersOf(ctx context.Context) layers {
	if l, ok := ctx.Value(contextKey{}).(*layers); ok {
		return *l
	}
	return layers{}
}

// With returns a context whose flows have a label of this key and value, and one for each further pair in more. They
// win over all other labels except Params.Labels. Of several pairs with one key the last one wins, also over several
// calls of With.
//
// These make every flow Invalid that starts with the context, or with one derived from it: a label beyond the limits, a
// last key without its value, and more than [MaxLabels] labels in all. The first such problem is kept, whatever later
// calls add.
func With(ctx context.Context, key, value string, more ...string) context.Context {
	next := layersOf(ctx)
	explicit := make(map[string]string, len(next.explicit)+1+len(more)/2)
	maps.Copy(explicit, next.explicit)
	next.explicit = explicit

	next.add(key, value)
	for len(more) >= 2 {
		next.add(more[0], more[1])
		more = more[2:]
	}
	if len(more) == 1 {
		next.fail(labelError(more[0], "no value"))
	}
	if len(explicit) > MaxLabels {
		next.fail(Check(explicit))
	}
	return newLabelled(ctx, next)
}

func (l *layers) add(key, value string) {
	if err := checkLabel(key, value); err != nil {
		l.fail(err)
		return
	}
	l.explicit[key] = value
}

func (l *layers) fail(err error) {
	if l.err == nil {
		l.err = err
	}
}

// WithTransport returns a context whose flows have the labels in m, which come from a peer. They win only over client
// defaults. For each key a later call wins over an earlier one. Labels beyond the limits are repaired or dropped, and
// are never an error: bad keys go, and values become valid UTF-8 and are cut. There may be more than [MaxLabels], so
// that no label of a peer pushes out another's. The context may keep m, which must not change any more.
func WithTransport(ctx context.Context, m map[string]string) context.Context {
	if len(m) == 0 {
		return ctx
	}
	next := layersOf(ctx)
	if next.transport != nil || !inOrder(m) {
		transport := make(map[string]string, len(next.transport)+len(m))
		maps.Copy(transport, next.transport)
		maps.Copy(transport, m)
		m = repair(transport)
	}
	next.transport = m
	return newLabelled(ctx, next)
}

// FromContext returns the labels that [With] and [WithTransport] put into ctx, and the first problem of With; nils if
// there are none. With an error it still returns the valid labels. The maps are shared with every holder of ctx and
// must not be changed. It allocates nothing.
func FromContext(ctx context.Context) (explicit, transport map[string]string, err error) {
	l := layersOf(ctx)
	return l.explicit, l.transport, l.err
}
