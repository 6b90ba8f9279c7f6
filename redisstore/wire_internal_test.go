package redisstore

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// sent returns commands as the client writes them.
func sent(commands ...string) string {
	var b strings.Builder
	for _, c := range commands {
		args := strings.Fields(c)
		fmt.Fprintf(&b, "*%d\r\n", len(args))
		for _, a := range args {
			fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
		}
	}
	return b.String()
}

// listOf returns a list of strings as a server sends it.
func listOf(typ string, elements ...string) string {
	s := typ + strconv.Itoa(len(elements)) + "\r\n"
	for _, e := range elements {
		s += fmt.Sprintf("$%d\r\n%s\r\n", len(e), e)
	}
	return s
}

// followed returns why the wire ends, if it reads and writes in steps of so many bytes. An exchange begins with a command, and has
// what the server sends at each second place.
func followed(step int, exchange ...string) error {
	var a awaited
	var c commands
	var r replies
	for i, s := range exchange {
		for part := range slices.Chunk([]byte(s), step) {
			var err error
			if i%2 == 0 {
				err = c.follow(part, &a)
			} else {
				err = r.follow(part, &a)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// What servers send, and what the client could not read without a panic, or without all memory.
func TestWire(t *testing.T) {
	hello := sent("HELLO 3")
	const ok = "+OK\r\n"
	get := func(reply string) []string { return []string{sent("HELLO 3", "GET k"), ok + reply} }
	const sentinels = "UNSUBSCRIBE +sentinel +switch-master"
	messages := func(typ string, rest ...string) []string { return []string{hello, ok + listOf(typ, rest...)} }
	for _, tt := range []struct {
		name     string
		exchange []string
		want     error
	}{
		{"null of version 3", get("_\r\n"), nil},
		{"null string of version 2", get("$-1\r\n"), nil},
		{"null list of version 2", get("*-1\r\n"), nil},
		{"string", get("$5\r\na\r\nbc\r\n"), nil},
		{"empty string", get("$0\r\n\r\n"), nil},
		{"integer", get(":-5\r\n"), nil},
		{"boolean", get("#t\r\n"), nil},
		{"double", get(",1.5\r\n"), nil},
		{"big number", get("(123456789012345678901234567890\r\n"), nil},
		{"error", get("-ERR no\r\n"), nil},
		{"long error", get("!6\r\nERR no\r\n"), nil},
		{"verbatim", get("=5\r\ntxt:a\r\n"), nil},
		{"line with a carriage return", get("+a\rb\r\n"), nil},
		{"empty list", get("*0\r\n"), nil},
		{"lists in lists", get("*2\r\n*1\r\n:1\r\n%1\r\n+a\r\n~2\r\n_\r\n#f\r\n"), nil},
		{"attribute", get("|1\r\n+a\r\n:1\r\n$1\r\na\r\n"), nil},
		{"attribute in a list", get("*1\r\n|1\r\n+a\r\n:1\r\n$1\r\na\r\n"), nil},
		{"empty attribute", get("|0\r\n:1\r\n"), nil},
		{"depth of the bound", get(strings.Repeat("*1\r\n", maxDepth) + ":1\r\n"), nil},
		{"deeper", get(strings.Repeat("*1\r\n", maxDepth+1) + ":1\r\n"), errLarge},
		{"line of the bound", get("+" + strings.Repeat("a", maxLine-1) + "\r\n"), nil},
		{"longer line", get("+" + strings.Repeat("a", maxLine) + "\r\n"), errLarge},
		{"endless line", get("+" + strings.Repeat("a", 2*maxLine)), errLarge},
		{"endless length", get("$" + strings.Repeat("0", 100)), errLarge},
		{"string of the bound", get(fmt.Sprintf("$%d\r\na", maxReply-elementCost)), nil},
		{"longer string", get(fmt.Sprintf("$%d\r\n", maxReply-elementCost+1)), errLarge},
		{"longest string", get("$9223372036854775807\r\n"), errLarge},
		{"longest error", get("!9223372036854775807\r\n"), errLarge},
		{"long error beyond a line", get(fmt.Sprintf("!%d\r\n", maxLine+1)), errLarge},
		{"negative string", get("$-9223372036854775807\r\n"), errLarge},
		{"string of -2", get("$-2\r\n"), errMalformed},
		{"null verbatim", get("=-1\r\n"), errMalformed},
		{"list of the bound", get(fmt.Sprintf("*%d\r\n:1\r\n", maxReply/elementCost-1)), nil},
		{"longer list", get(fmt.Sprintf("*%d\r\n", maxReply/elementCost)), errLarge},
		{"longest list", get("*9223372036854775807\r\n"), errLarge},
		{"map whose double is negative", get("%4611686018427387904\r\n"), errLarge},
		{"map of more than a list", get(fmt.Sprintf("%%%d\r\n", maxReply/elementCost/2+1)), errLarge},
		{"null map", get("%-1\r\n"), errMalformed},
		{"null attribute", get("|-1\r\n"), errMalformed},
		{"null set", get("~-1\r\n"), errMalformed},
		{"null message", get(">-1\r\n"), errMalformed},
		{"lists that are too much together", get("*2\r\n" + strings.Repeat(fmt.Sprintf("*%d\r\n", maxReply/elementCost/2), 3)), errLarge},
		{"strings that are too much together", get("*3\r\n$9\r\n123456789\r\n" + fmt.Sprintf("$%d\r\n", maxReply-4*elementCost)), errLarge},
		{"endless attributes", get(strings.Repeat("|0\r\n", maxReply/elementCost+1)), errLarge},
		{"message in a list", get("*1\r\n>2\r\n+a\r\n+b\r\n"), errMalformed},
		{"string whose length comes later", get("$?\r\n;1\r\na\r\n;0\r\n"), errMalformed},
		{"list whose length comes later", get("*?\r\n.\r\n"), errMalformed},
		{"end without a beginning", get(".\r\n"), errMalformed},
		{"no type", get("GET / HTTP/1.1\r\n"), errMalformed},
		{"line without a carriage return", get("+a\n"), errMalformed},
		{"length without a carriage return", get("$1\na\r\n"), errMalformed},
		{"string without an end", get("$1\r\nabc"), errMalformed},
		{"null with a text", get("_a\r\n"), errMalformed},
		{"boolean with a text", get("#true\r\n"), errMalformed},
		{"integer without a digit", get(":\r\n"), errMalformed},
		{"length without a digit", get("$\r\n"), errMalformed},
		{"length with a sign only", get("$-\r\n"), errMalformed},

		{"redirection", get("-MOVED 1 127.0.0.1:6379\r\n"), nil},
		{"redirection without an address", get("-MOVED 1\r\n"), errMalformed},
		{"redirection without anything", get("-ASK\r\n"), errMalformed},
		{"redirection behind a code", get("-ERR MOVED 1\r\n"), errMalformed},
		{"redirection in a long error", get("!5\r\nMOVED\r\n"), errMalformed},
		{"redirection to a primary, without an address", get("-REDIRECT\r\n"), errMalformed},

		{"reply to nothing", []string{hello, ok + ok}, errUnasked},
		{"reply before the command", []string{"", ok}, errUnasked},
		{"reply to a part of a command", []string{hello, ok, "*2\r\n$3\r\nGET\r\n", ok}, errUnasked},
		{"replies in turn", []string{hello, ok, sent("GET a", "GET b"), ok + ok, sent("GET c"), ok}, nil},
		{"one reply more than commands", []string{hello, ok, sent("GET a", "GET b"), ok + ok + ok}, errUnasked},

		{"message", messages(">", "message", "c", "m"), nil},
		{"message of nothing", messages(">"), nil},
		{"subscription that nobody asked for", messages(">", "subscribe", "c", "1"), errUnasked},
		{"subscription for another command", []string{sent("HELLO 3", "GET a"), ok + listOf(">", "ssubscribe", "c", "1")}, errUnasked},
		{"end of a subscription that nobody asked for", messages(">", "unsubscribe", "c", "0"), nil},
		{"subscription", []string{sent("HELLO 3", "SUBSCRIBE c", "GET a"), ok + listOf(">", "subscribe", "c", "1") + ok}, nil},
		{"subscriptions", []string{
			sent("HELLO 3", "SUBSCRIBE c d", "GET a"),
			ok + listOf(">", "subscribe", "c", "1") + listOf(">", "message", "c", "m") + listOf(">", "subscribe", "d", "2") + ok,
		}, nil},
		{"more subscriptions than channels", []string{
			sent("HELLO 3", "SUBSCRIBE c", "GET a"), ok + strings.Repeat(listOf(">", "subscribe", "c", "1"), 2),
		}, errUnasked},
		{"subscription that is refused", []string{sent("HELLO 3", "SUBSCRIBE c d", "GET a"), ok + "-NOPERM no\r\n" + ok}, nil},
		{"subscription that is queued", []string{sent("HELLO 3", "SUBSCRIBE c"), ok + "+QUEUED\r\n"}, errUnasked},
		{"command that is queued", get("+QUEUED\r\n"), nil},

		{"subscription by version 2", []string{
			sent("CLIENT SETINFO", "SUBSCRIBE c", "PING"),
			ok + listOf("*", "subscribe", "c", "1") + listOf("*", "message", "c", "m") + listOf("*", "pong", ""),
		}, nil},
		{"subscription by version 2 that nobody asked for", []string{sent("HELLO 2"), ok + listOf("*", "subscribe", "c", "1")}, errUnasked},
		{"list as the reply to a greeting", []string{sent("HELLO 2", "CLIENT SETINFO"), listOf("*", "server", "x") + ok + ok}, errUnasked},
		{"list after a greeting", []string{sent("HELLO 2", "PING"), ok + listOf("*", "a", "b") + ok}, nil},
		{"reply more after a list", []string{sent("HELLO 2", "PING"), ok + listOf("*", "a", "b") + ok + ok}, errUnasked},

		{"end of subscriptions", []string{
			sent("HELLO 3", sentinels, "PING", "GET a"),
			ok + listOf(">", "unsubscribe", "+sentinel", "1") + listOf(">", "unsubscribe", "+switch-master", "0") + "+PONG\r\n" + ok,
		}, nil},
		{"end of subscriptions, and a reply more", []string{sent("HELLO 3", sentinels, "PING"), ok + "+PONG\r\n+PONG\r\n"}, errUnasked},
		{"end of subscriptions that is refused", []string{
			sent("HELLO 3", sentinels, "PING", "GET a"), ok + "-NOPERM 'unsubscribe'\r\n+PONG\r\n" + ok,
		}, nil},
		{"end of subscriptions that is refused as the last", []string{
			sent("HELLO 3", sentinels, "PING"), ok + "-NOPERM 'unsubscribe'\r\n+PONG\r\n",
		}, nil},
		{"end of subscriptions that is refused, and no more", []string{
			sent("HELLO 3", sentinels, "PING", "GET a"), ok + "-NOPERM 'unsubscribe'\r\n" + ok,
		}, errUnasked},
		{"ping that is refused", []string{
			sent("HELLO 3", sentinels, "PING", "GET a"), ok + "-NOPERM no permissions to run the 'ping' command\r\n" + ok,
		}, nil},
		{"end of subscriptions while the server loads", []string{sent("HELLO 3", sentinels, "PING", "GET a"), ok + "-LOADING x\r\n" + ok}, nil},
		{"end of subscriptions that is queued", []string{sent("HELLO 3", sentinels, "PING"), ok + "+QUEUED\r\n"}, errUnasked},

		{"role", []string{sent("HELLO 3", "ROLE"), ok + listOf("*", "master")}, nil},
		{"role that is null", []string{sent("HELLO 3", "ROLE"), ok + "*-1\r\n"}, nil},
		{"role of nothing", []string{sent("HELLO 3", "ROLE"), ok + "*0\r\n"}, errMalformed},
		{"role of nothing, as a set", []string{sent("HELLO 3", "ROLE"), ok + "~0\r\n"}, errMalformed},
		{"address", []string{sent("HELLO 3", "SENTINEL GET-MASTER-ADDR-BY-NAME p"), ok + listOf("*", "h", "1")}, nil},
		{"address without a port", []string{sent("HELLO 3", "SENTINEL GET-MASTER-ADDR-BY-NAME p"), ok + listOf("*", "h")}, errMalformed},
		{"list of Sentinels that is empty", []string{sent("HELLO 3", "SENTINEL SENTINELS p"), ok + "*0\r\n"}, nil},
		{"Sentinel", messages(">", "message", "+sentinel", "sentinel id 127.0.0.1 1 @ p 127.0.0.1 2"), nil},
		{"Sentinel without an address", messages(">", "message", "+sentinel", "sentinel id"), errMalformed},
		{"Sentinel without a text", []string{hello, ok + ">3\r\n+message\r\n++sentinel\r\n:1\r\n"}, errMalformed},
		{"failover", messages(">", "message", "+switch-master", "p 127.0.0.1 1 127.0.0.1 2"), nil},
		{"failover to nowhere", messages(">", "message", "+switch-master", "p 127.0.0.1 1 127.0.0.1"), errMalformed},
		{"failover to nowhere, by version 2", []string{
			sent("HELLO 2", "SUBSCRIBE +switch-master"), ok + listOf("*", "message", "+switch-master", "p"),
		}, errMalformed},
		{"restart of nothing", messages(">", "message", "+reboot", "master"), errMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, step := range []int{1 << 30, 1, 2, 3} {
				if err := followed(step, tt.exchange...); !errors.Is(err, tt.want) {
					t.Errorf("by %d bytes: %v want %v", step, err, tt.want)
				}
			}
		})
	}
}

// Replies to commands that were under way together have a bound together. Those of commands that came later do not count.
func TestWireTogether(t *testing.T) {
	var a awaited
	var c commands
	var r replies
	follow := func(what func([]byte, *awaited) error, text string) error { return what([]byte(text), &a) }
	if err := follow(c.follow, sent("HELLO 3")); err != nil {
		t.Fatal(err)
	}
	if err := follow(r.follow, "+OK\r\n"); err != nil {
		t.Fatal(err)
	}
	value := fmt.Sprintf("$%d\r\n%s\r\n", maxReply/2, strings.Repeat("a", maxReply/2))
	for range 10 {
		if err := errors.Join(follow(c.follow, sent("GET k")), follow(r.follow, value)); err != nil {
			t.Fatalf("one after the other: %v", err)
		}
	}
	if err := follow(c.follow, sent(slices.Repeat([]string{"GET k"}, 10)...)); err != nil {
		t.Fatal(err)
	}
	replies := 0
	for ; replies < 10; replies++ {
		if err := follow(r.follow, value); err != nil {
			if !errors.Is(err, errLarge) {
				t.Errorf("together: %v want %v", err, errLarge)
			}
			break
		}
	}
	if want := maxReplies / (maxReply / 2); replies < want-1 || replies > want {
		t.Errorf("%d replies together want about %d", replies, want)
	}
}

func TestWireAllocatesNothing(t *testing.T) {
	var a awaited
	var c commands
	var r replies
	command, reply := []byte(sent("HELLO 3", "EVALSHA x 1 k a")), []byte("+OK\r\n*2\r\n$3\r\nabc\r\n:1\r\n")
	if n := testing.AllocsPerRun(10, func() {
		if err := errors.Join(c.follow(command, &a), r.follow(reply, &a)); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// value reads one reply, as simply as can be, and returns what comes after it. It fails if there is less, or something else. What it
// costs is below the bounds.
func value(p []byte, depth int) (rest []byte, ok bool) {
	if len(p) == 0 {
		return nil, false
	}
	typ := p[0]
	end := bytes.IndexByte(p, '\n')
	if end < 2 || p[end-1] != '\r' {
		return nil, false
	}
	line := string(p[1 : end-1])
	rest = p[end+1:]
	switch typ {
	case '+', '-', ',', '(':
		return rest, true
	case ':':
		return rest, line != ""
	case '#':
		return rest, len(line) == 1 && line != "\r"
	case '_':
		return rest, line == ""
	}
	if (typ == '$' || typ == '*') && strings.TrimLeft(line, "0123456789") == "-" {
		return nil, false
	}
	if minus, is := strings.CutPrefix(line, "-"); is && (typ == '$' || typ == '*') {
		n, err := strconv.ParseUint(minus, 10, 63)
		return rest, err == nil && n == 1 && len(minus) <= maxDigits
	}
	n, err := strconv.ParseUint(line, 10, 63)
	if err != nil || len(line) > maxDigits || strings.HasPrefix(line, "+") || n > 1<<20 {
		return nil, false
	}
	switch typ {
	case '$', '!', '=':
		if uint64(len(rest)) < n+2 || string(rest[n:n+2]) != "\r\n" || typ == '!' && n > maxLine {
			return nil, false
		}
		return rest[n+2:], true
	case '%', '|':
		n *= 2
	case '*', '~':
	case '>':
		if depth > 0 {
			return nil, false
		}
	default:
		return nil, false
	}
	if n > 0 && depth == maxDepth {
		return nil, false
	}
	for range n {
		if rest, ok = value(rest, depth+1); !ok {
			return nil, false
		}
	}
	if typ == '|' {
		return value(rest, depth)
	}
	return rest, true
}

// What a wire takes for a reply is one by a simpler reader, wherever the bytes are divided.
func FuzzWire(f *testing.F) {
	for _, reply := range []string{
		"+OK\r\n", "$5\r\nhello\r\n", "*2\r\n:1\r\n$-1\r\n", "%1\r\n+a\r\n#t\r\n", "|1\r\n+a\r\n:1\r\n*0\r\n", ">2\r\n+a\r\n+b\r\n",
		"*1\r\n*1\r\n*1\r\n_\r\n", "=5\r\ntxt:a\r\n", "!5\r\nERR a\r\n", "-MOVED 1 a:1\r\n", "~1\r\n,1.5\r\n", "(1\r\n", "$9223372036854775807\r\n",
		"|0\r\n|0\r\n:1\r\n", "*1\r\n|1\r\n+a\r\n+b\r\n+c\r\n",
	} {
		f.Add([]byte(reply), []byte{1, 3})
	}
	f.Fuzz(func(t *testing.T, p, steps []byte) {
		rest, ok := value(p, 0)
		a := awaited{sent: 1}
		var r replies
		ended := -1 // after how many bytes
		var err error
		for at := 0; at < len(p) && err == nil && ended < 0; at++ { // by one byte, to know where the reply ends
			if err = r.follow(p[at:at+1], &a); err == nil && r.at == atType && r.depth == 0 && r.cost == 0 {
				ended = at + 1
			}
		}
		// What the client would fail at, although it is a reply.
		strict := bytes.Contains(p, []byte("MOVED")) || bytes.Contains(p, []byte("ASK")) || bytes.Contains(p, []byte("REDIRECT")) ||
			bytes.Contains(p, []byte("subscribe")) || bytes.Contains(p, []byte("message"))
		switch got := err == nil && ended >= 0; {
		case got && !ok, ok && !got && !strict:
			t.Fatalf("%q: followed %v (%v), read %v", p, got, err, ok)
		case got && len(p)-ended != len(rest):
			t.Fatalf("%q ends after %d bytes want %d", p, ended, len(p)-len(rest))
		}
		// The same, in other parts.
		b := awaited{sent: 1}
		var again replies
		var err2 error
		upTo := p
		if ended >= 0 {
			upTo = p[:ended]
		}
		for i := 0; len(upTo) > 0 && err2 == nil; i++ {
			n := len(upTo)
			if len(steps) > 0 {
				n = min(n, 1+int(steps[i%len(steps)]))
			}
			err2 = again.follow(upTo[:n], &b)
			upTo = upTo[n:]
		}
		if !errors.Is(err2, err) || !errors.Is(err, err2) || err == nil && again != r {
			t.Fatalf("%q: %v by one byte, and %v by others:\n%+v\n%+v", p, err, err2, r, again)
		}
	})
}
