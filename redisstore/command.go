package redisstore

// commands follows the commands that the client writes. It knows what the client makes of them, and no other form.
type commands struct {
	at     commandStage
	number int // of the line
	args   int // of the command
	arg    int // which of them is next
	left   int // bytes of the argument, with its line's end
	words  [2]word
	ping   bool // the command is the PING after UNSUBSCRIBE, which is no command of its own
	begun  bool // there was one
}

// maxNumber is more than any number of arguments or bytes that a server takes, and an int of 32 bits holds it.
const maxNumber = 1_000_000_000

type commandStage uint8

const (
	atCommand commandStage = iota // before *
	atArgs                        // in their number
	atArg                         // before $
	atLength                      // in the argument's
	atBytes                       // of the argument
)

// A word is the beginning of a text.
type word struct {
	bytes [32]byte
	n     int // bytes of the text, of which there may be more than the beginning
}

func (w *word) add(p []byte) {
	if w.n < len(w.bytes) {
		copy(w.bytes[w.n:], p)
	}
	w.n += len(p)
}

// is reports whether the text is this one.
func (w *word) is(text string) bool { return w.n == len(text) && w.begins(text) }

// begins reports whether the text begins so.
func (w *word) begins(text string) bool {
	return w.n >= len(text) && string(w.bytes[:len(text)]) == text
}

// follow notes the commands in p that end there.
func (c *commands) follow(p []byte, to *awaited) error {
	for len(p) > 0 {
		b := p[0]
		if c.at == atBytes {
			n := min(len(p), c.left)
			if c.arg < len(c.words) {
				c.words[c.arg].add(p[:max(min(n, c.left-2), 0)])
			}
			p = p[n:]
			if c.left -= n; c.left > 0 {
				continue
			}
			c.at = atArg
			if c.arg++; c.arg == c.args {
				c.at = atCommand
				if err := c.end(to); err != nil {
					return err
				}
			}
			continue
		}
		p = p[1:]
		switch {
		case c.at == atCommand && b == '*':
			c.at, c.number, c.arg = atArgs, 0, 0
			c.words = [2]word{}
		case c.at == atArg && b == '$':
			c.at, c.number = atLength, 0
		case (c.at == atArgs || c.at == atLength) && '0' <= b && b <= '9' && c.number < maxNumber/10:
			c.number = c.number*10 + int(b-'0')
		case (c.at == atArgs || c.at == atLength) && b == '\r':
		case c.at == atArgs && b == '\n' && c.number > 0:
			c.at, c.args = atArg, c.number
		case c.at == atLength && b == '\n':
			c.at, c.left = atBytes, c.number+2
		default:
			return errCommand
		}
	}
	return nil
}

// end notes a command.
func (c *commands) end(to *awaited) error {
	if c.ping {
		c.ping = false
		return nil
	}
	name, second := &c.words[0], &c.words[1]
	if !c.begun {
		c.begun = true
		to.alone = !name.is("HELLO") || !second.is("3") // the client begins so on all connections but those
	}
	s := special{args: c.args - 1}
	switch {
	case name.is("HELLO"), name.is("AUTH"), name.is("SELECT"), name.is("CLIENT"), name.is("READONLY"):
		s.kind = greeting
	case name.is("SUBSCRIBE"), name.is("PSUBSCRIBE"), name.is("SSUBSCRIBE"):
		s.kind = subscribe
	case name.is("UNSUBSCRIBE"), name.is("PUNSUBSCRIBE"), name.is("SUNSUBSCRIBE"):
		s.kind = unsubscribe
		c.ping = true
	case name.is("ROLE"):
		s = special{kind: list, args: 1}
	case name.is("SENTINEL") && second.is("GET-MASTER-ADDR-BY-NAME"):
		s = special{kind: list, args: 2}
	}
	return to.add(s)
}
