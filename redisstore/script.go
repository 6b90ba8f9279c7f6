package redisstore

import (
	"context"
	"crypto/sha1" // it is the name that Redis gives a script
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
)

// What scripts have in common is before each of them.
var (
	//go:embed head.lua
	headLua string
	//go:embed plain.lua
	plainLua string
	//go:embed state.lua
	stateLua string
	//go:embed quota.lua
	quotaLua string
	//go:embed slots.lua
	slotsLua string
	//go:embed take.lua
	takeLua string
	//go:embed return.lua
	returnLua string
	//go:embed lease.lua
	leaseLua string
	//go:embed ramp.lua
	rampLua string
)

// A script is one that servers keep by its hash.
type script struct{ text, sha string }

func newScript(text string) *script { return scriptOf(headLua, stateLua, quotaLua, slotsLua, text) }

// newBucketScript returns a script that knows buckets only. A server compiles a script once, but makes its functions at each call: a
// lone call takes a fifth less time without those that it does not need. What is before the functions does without all of them.
func newBucketScript(text string) *script { return scriptOf(headLua, stateLua, text) }

func scriptOf(parts ...string) *script {
	text := strings.Join(parts, "")
	sum := sha1.Sum([]byte(text))
	return &script{text, hex.EncodeToString(sum[:])}
}

// scripts are those of a store.
type scripts struct{ take, takeTokens, giveBack, lease, ramp, queue, queueTokens, probe *script }

func newScripts() scripts {
	return scripts{
		take:        newScript(takeLua),
		takeTokens:  scriptOf(headLua, plainLua, stateLua, takeLua),
		giveBack:    newScript(returnLua),
		lease:       newBucketScript(leaseLua),
		ramp:        newBucketScript(rampLua),
		queue:       newScript(queueLua),
		queueTokens: newBucketScript(queueLua),
		// It does what all of them do: it asks for the time, reads if it has a key, and packs numbers. Any server of a cluster runs it without.
		probe: scriptOf("local time = redis.call('TIME')\nif KEYS[1] then redis.call('GET', KEYS[1]) end\nreturn struct.pack('<d', time[1] * 1e6 + time[2])\n"),
	}
}

// all returns all of them.
func (s *scripts) all() []*script {
	return []*script{s.take, s.takeTokens, s.giveBack, s.lease, s.ramp, s.queue, s.queueTokens, s.probe}
}

// command returns the call of the script by its hash, or by its text.
func (sc *script) command(client rueidis.Client, byText bool, keys []string, arg []byte) rueidis.Completed {
	input := rueidis.BinaryString(arg)
	if byText {
		return client.B().Eval().Script(sc.text).Numkeys(int64(len(keys))).Key(keys...).Arg(input).Build()
	}
	return client.B().Evalsha().Sha1(sc.sha).Numkeys(int64(len(keys))).Key(keys...).Arg(input).Build()
}

// run runs the script. A server that does not know it, has not run it, and gets its text. Nothing else is ever tried again.
func (s *Store) run(ctx context.Context, sc *script, keys []string, arg []byte) ([]byte, error) {
	return runAt(ctx, s.client, sc, keys, arg)
}

// runAt runs the script at the server of a client.
func runAt(ctx context.Context, client rueidis.Client, sc *script, keys []string, arg []byte) ([]byte, error) {
	reply, err := client.Do(ctx, sc.command(client, false, keys, arg)).AsBytes()
	if unknownScript(err) {
		reply, err = client.Do(ctx, sc.command(client, true, keys, arg)).AsBytes()
	}
	return reply, err
}

func unknownScript(err error) bool {
	answer, ok := rueidis.IsRedisErr(err)
	return ok && answer.IsNoScript()
}

// unbounded is a context without a deadline that ends all the same. A connection of rueidis that works synchronously is closed when a
// deadline passes, with all that is under way there. Without a deadline it does not work synchronously.
type unbounded struct{ context.Context }

func (u unbounded) Deadline() (deadline time.Time, ok bool) { return deadline, false }

// A serverError is what the store's server has answered instead of a result, such as OOM or READONLY.
type serverError struct{ code string }

func (e *serverError) Error() string { return "the store's server has refused: " + e.code }

// A timeoutError is that the store's own bound of a call has passed.
type timeoutError string

func (e timeoutError) Error() string { return string(e) }
func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return true }

// What calls fail with.
var (
	errTimeout    = error(timeoutError("the store did not answer in time"))
	errConnection = errors.New("the connection to the store has failed")
	errReply      = errors.New("the store's answer makes no sense")
	errNewer      = errors.New("the key's state was written by a newer version, or by another program")
	errLate       = errors.New("the store got the call too late")
	errCalendar   = errors.New("the store's clock and this process's are too far apart for a calendar")
	errTooMany    = fmt.Errorf("a flow asks the store for more than %d keys", maxAsks)
	errValue      = fmt.Errorf("a value has more than %d bytes", maxCached)
	errClosed     = shared.ErrClosed
)

// refusal returns the error for what the server has refused. It has the first word of the server's answer, because the rest may have
// addresses and names of keys.
func refusal(err *rueidis.RedisError) error {
	code, _, _ := strings.Cut(err.Error(), " ")
	if code == "" || strings.ToUpper(code) != code {
		code = "ERR"
	}
	return &serverError{code}
}

// mayHaveCounted reports whether a server may have done what a call that failed was to do, or a part of it. A script that fails in the
// middle keeps what it has done until then.
func mayHaveCounted(err error) bool {
	refused, ok := errors.AsType[*serverError](err)
	if !ok {
		return errors.Is(err, errTimeout) || errors.Is(err, errConnection) || errors.Is(err, errReply)
	}
	switch refused.code {
	case "ASK", "BUSY", "CLUSTERDOWN", "CROSSSLOT", "LOADING", "MASTERDOWN", "MOVED", "NOAUTH", "NOSCRIPT", "TRYAGAIN", "WRONGPASS":
		return false // before the script begins
	case "MISCONF", "NOREPLICAS", "OOM", "READONLY":
		return false // at the first write of the script, and at none after that
	default:
		return true
	}
}
