package redisstore

import "bytes"

// The bounds of replies. What the store needs is far less: a batch's reply has 20 KiB, and the slots of a cluster of 1,000 servers have
// some 100 KiB. Cached values are the largest.
const (
	// maxReply is what a reply may cost: its bytes, and elementCost for each of its elements.
	maxReply = 64 << 20

	// maxReplies is what replies may cost together whose commands were under way at the same time. The client keeps them until the
	// last one is there.
	maxReplies = 128 << 20

	// elementCost is about what an element takes in memory. The client makes room for all elements of a list when it has read how many
	// there are.
	elementCost = 48

	maxLine   = 64 << 10 // bytes
	maxDigits = 10       // of a length
	maxDepth  = 32       // of lists in lists
)

const (
	typeString   = '$'
	typeError    = '-'
	typeLongErr  = '!'
	typeArray    = '*'
	typeSet      = '~'
	typeMap      = '%'
	typePush     = '>'
	typeAttr     = '|'
	typeNull     = '_'
	typeBool     = '#'
	typeInteger  = ':'
	typeSimple   = '+'
	typeDouble   = ','
	typeBig      = '('
	typeVerbatim = '='
)

// replies follows what a server sends: replies and messages in version 2 or 3 of the protocol. It accepts what servers send, which is less
// than the protocol has: no server sends strings or lists whose length comes at the end. So the client and this agree about where a reply
// ends.
type replies struct {
	at     replyStage
	typ    byte
	line   int // bytes of it
	ends   bool
	number int64
	digits int
	minus  bool
	left   int64 // bytes of the string, and then of its line's end

	depth    int
	elements [maxDepth]int64 // that are left of each list
	attr     uint64          // the lists that are attributes of what follows, by their bits

	cost   int64
	reply  reply
	text   text
	wanted wanted
}

type replyStage uint8

const (
	atType replyStage = iota
	atLine
	atString
	atEnd // of a string
)

// A reply is what the client relies on of a reply or message.
type reply struct {
	typ       byte
	size      int
	word      replyWord // the text, or the first element
	wants     int       // how many words a message of its channel has at least
	words     int       // of the message
	aboutPing bool      // the error is about PING
}

type replyWord uint8

const (
	wordOther replyWord = iota
	wordPong
	wordQueued
	wordMessage
	wordSubscribe
	wordUnsubscribe
)

func (r *reply) array() bool { return r.typ == typeArray || r.typ == typeSet }

// pong reports whether the client takes this for the reply to the PING after UNSUBSCRIBE.
func (r *reply) pong() bool { return r.word == wordPong || r.aboutPing }

// wanted is what is to be known of a text.
type wanted uint8

const (
	atWord   wanted = 1 << iota // how it begins
	atSpaces                    // how many there are
	atPing                      // whether it has quotedPing
)

// A text is what has come of a string or line.
type text struct {
	word

	spaces int
	quoted int // how much of quotedPing has come
}

// quotedPing is what an error has that refuses PING by an access list.
const quotedPing = "'ping'"

func (t *text) add(p []byte, wanted wanted) {
	if wanted&atWord != 0 {
		t.word.add(p)
	}
	if wanted&atSpaces != 0 {
		t.spaces += bytes.Count(p, []byte{' '})
	}
	if wanted&atPing == 0 {
		return
	}
	for _, b := range p {
		switch {
		case t.quoted == len(quotedPing):
			return
		case b == quotedPing[t.quoted]:
			t.quoted++
		case b == quotedPing[0]:
			t.quoted = 1
		default:
			t.quoted = 0
		}
	}
}

// follow checks what has come.
func (r *replies) follow(p []byte, a *awaited) error {
	for len(p) > 0 {
		var err error
		switch r.at {
		case atType:
			err = r.begin(p[0], a)
			p = p[1:]
		case atLine:
			p, err = r.inLine(p, a)
		case atString:
			n := min(int64(len(p)), r.left)
			r.text.add(p[:n], r.wanted)
			p = p[n:]
			if r.left -= n; r.left == 0 {
				r.at, r.left = atEnd, 2
			}
		case atEnd:
			if p[0] != "\n\r"[r.left-1] {
				return errMalformed
			}
			p = p[1:]
			if r.left--; r.left == 0 {
				err = r.endText(a)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// spend counts what the reply costs.
func (r *replies) spend(cost int64, a *awaited) error {
	if r.cost += cost; r.cost > maxReply || a.cost+r.cost > maxReplies {
		return errLarge
	}
	return nil
}

// begin begins an element, or an attribute before one.
func (r *replies) begin(typ byte, a *awaited) error {
	r.at, r.typ = atLine, typ
	r.line, r.ends, r.number, r.digits, r.minus = 0, false, 0, 0, false
	switch typ {
	case typeString, typeError, typeLongErr, typeSimple, typeDouble, typeBig, typeVerbatim:
		r.text, r.wanted = text{}, r.wants()
	case typeArray, typeSet, typeMap, typeAttr, typeNull, typeBool, typeInteger:
	case typePush:
		if r.depth > 0 {
			return errMalformed
		}
	default:
		return errMalformed
	}
	if r.depth > 0 && typ != typeAttr {
		return nil // the list has counted it
	}
	if r.depth == 0 {
		r.reply = reply{typ: typ}
	}
	return r.spend(elementCost, a)
}

// place returns which element of the reply begins, of its first three. It is 0 for the reply itself, and -1 for any other element.
func (r *replies) place() int {
	switch {
	case r.depth == 0:
		return 0
	case r.depth == 1 && r.attr&1 == 0 && r.reply.size-int(r.elements[0]) < 3:
		return r.reply.size - int(r.elements[0])
	default:
		return -1
	}
}

// wants returns what is to be known of the text that begins.
func (r *replies) wants() wanted {
	place := r.place()
	switch {
	case r.typ == typeError:
		return atWord | atSpaces | atPing
	case r.typ == typeLongErr, r.depth == 1 && place == 2:
		return atWord | atSpaces
	case place >= 0:
		return atWord
	default:
		return 0
	}
}

// inLine reads of a line what is there of it, and returns the rest.
func (r *replies) inLine(p []byte, a *awaited) ([]byte, error) {
	part, rest, whole := bytes.Cut(p, []byte{'\n'})
	if r.line += len(part); r.line > maxLine {
		return nil, errLarge
	}
	switch r.typ {
	case typeError, typeSimple, typeDouble, typeBig, typeInteger:
		if err := r.spend(int64(len(part)), a); err != nil {
			return nil, err
		}
		if r.typ != typeInteger {
			r.text.add(part, r.wanted)
		}
		if len(part) > 0 {
			r.ends = part[len(part)-1] == '\r'
		}
	case typeNull, typeBool:
		for _, b := range part {
			if r.ends {
				return nil, errMalformed
			}
			r.ends = b == '\r'
		}
	default:
		for _, b := range part {
			if err := r.digit(b); err != nil {
				return nil, err
			}
		}
	}
	if !whole {
		return rest, nil
	}
	if !r.ends {
		return nil, errMalformed
	}
	return rest, r.endLine(a)
}

// digit reads a byte of a length.
func (r *replies) digit(b byte) error {
	switch {
	case r.ends:
		return errMalformed
	case b == '\r':
		r.ends = true
	case b == '-' && r.digits == 0 && !r.minus:
		r.minus = true
	case '0' <= b && b <= '9':
		if r.digits++; r.digits > maxDigits {
			return errLarge
		}
		r.number = r.number*10 + int64(b-'0')
	default:
		return errMalformed
	}
	return nil
}

func (r *replies) endLine(a *awaited) error {
	length := r.line - 1
	switch r.typ {
	case typeError, typeSimple, typeDouble, typeBig:
		r.text.n--
		return r.endText(a)
	case typeInteger:
		if length == 0 {
			return errMalformed
		}
		return r.end(a)
	case typeNull, typeBool:
		if r.typ == typeNull && length != 0 || r.typ == typeBool && length != 1 {
			return errMalformed
		}
		return r.end(a)
	}
	switch {
	case r.digits == 0:
		return errMalformed
	case r.minus:
		// This is how version 2 says null.
		if r.number != 1 || r.typ != typeString && r.typ != typeArray {
			return errMalformed
		}
		if r.depth == 0 {
			r.reply.typ = typeNull
		}
		return r.end(a)
	}
	switch r.typ {
	case typeString, typeLongErr, typeVerbatim:
		if r.typ == typeLongErr && r.number > maxLine {
			return errLarge
		}
		r.at, r.left = atString, r.number
		if r.left == 0 {
			r.at, r.left = atEnd, 2
		}
		return r.spend(r.number, a)
	default:
		return r.beginList(a)
	}
}

func (r *replies) beginList(a *awaited) error {
	n := r.number
	if r.typ == typeMap || r.typ == typeAttr {
		n *= 2
	}
	if n > maxReply/elementCost {
		return errLarge
	}
	if err := r.spend(n*elementCost, a); err != nil {
		return err
	}
	if r.depth == 0 && r.typ != typeAttr {
		r.reply.size = int(n)
	}
	switch {
	case n == 0 && r.typ == typeAttr:
		r.at = atType
		return nil
	case n == 0:
		return r.end(a)
	case r.depth == maxDepth:
		return errLarge
	}
	bit := uint64(1) << r.depth
	r.attr &^= bit
	if r.typ == typeAttr {
		r.attr |= bit
	}
	r.elements[r.depth] = n
	r.depth++
	r.at = atType
	return nil
}

// endText looks at a text that has come.
func (r *replies) endText(a *awaited) error {
	if r.typ == typeError || r.typ == typeLongErr {
		if err := r.text.redirection(); err != nil {
			return err
		}
	}
	if r.depth == 0 {
		r.reply.look(&r.text)
		return r.end(a)
	}
	switch r.place() {
	case 0:
		r.reply.word = wordOf(&r.text.word)
		if r.reply.word == wordPong || r.reply.word == wordQueued {
			r.reply.word = wordOther
		}
		if r.text.is("pong") {
			r.reply.word = wordPong
		}
	case 1:
		r.reply.wants = wordsOn(&r.text.word)
	case 2:
		r.reply.words = r.text.spaces + 1
	}
	return r.end(a)
}

// redirection returns an error for a redirection without an address: the client would read beyond the end of it.
func (t *text) redirection() error {
	w, spaces := t.word, t.spaces
	if w.begins("ERR ") {
		copy(w.bytes[:], w.bytes[4:])
		w.n -= 4
		spaces--
	}
	if (w.begins("MOVED") || w.begins("ASK")) && spaces < 2 || w.begins("REDIRECT") && spaces < 1 {
		return errMalformed
	}
	return nil
}

func wordOf(w *word) replyWord {
	switch {
	case w.is("PONG"):
		return wordPong
	case w.is("QUEUED"):
		return wordQueued
	case w.is("message"):
		return wordMessage
	case w.is("subscribe"), w.is("psubscribe"), w.is("ssubscribe"):
		return wordSubscribe
	case w.is("unsubscribe"), w.is("punsubscribe"), w.is("sunsubscribe"):
		return wordUnsubscribe
	default:
		return wordOther
	}
}

// look notes the text of a reply that is a text.
func (r *reply) look(t *text) {
	r.word = wordOf(&t.word)
	if r.word != wordPong && r.word != wordQueued {
		r.word = wordOther
	}
	r.aboutPing = r.typ == typeError && (t.begins("LOADING") || t.begins("BUSY") || t.quoted == len(quotedPing))
}

// wordsOn returns how many words the client expects of a message on a channel of a Sentinel.
func wordsOn(channel *word) int {
	switch {
	case channel.is("+sentinel"), channel.is("+reboot"):
		return 4
	case channel.is("+switch-master"):
		return 5
	default:
		return 0
	}
}

// end ends an element, and the lists whose last one it is.
func (r *replies) end(a *awaited) error {
	r.at = atType
	for r.depth > 0 {
		top := r.depth - 1
		if r.elements[top]--; r.elements[top] > 0 {
			return nil
		}
		r.depth = top
		if r.attr>>top&1 == 1 {
			return nil // what it is of follows
		}
	}
	cost := r.cost
	r.cost = 0
	return a.take(&r.reply, cost)
}
