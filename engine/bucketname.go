package engine

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/credential"
)

// maxBucketName is the longest value that names its bucket itself, in bytes.
const maxBucketName = 256

// maxValue is the longest value that a component goes by, in bytes. To hash a longer one would take long: a component that
// goes by it rejects the flow.
const maxValue = 64 << 10

// A namer gives the name of the bucket of a label's value. Buckets are kept by it, and answers
// hold it in place of the label's value, over the wire too, where the name finds the bucket again when the flow ends.
//
// Most values are their own names. The value of a header that carries credentials is a code of it by the engine's secret,
// so that nobody who sees an answer, or the memory of an engine, has the credentials. A long one is shortened.
type namer struct{ secret []byte }

func (e *Engine) namer(labelKey string) namer {
	if credential.HeaderLabel(labelKey) {
		return namer{e.secret[:]}
	}
	return namer{}
}

func (n namer) name(value string) string {
	if n.secret == nil {
		return agentapi.ShortValue(value, maxBucketName)
	}
	code := hmac.New(sha256.New, n.secret)
	_, _ = code.Write([]byte(value))
	return "hidden:" + hex.EncodeToString(code.Sum(nil)[:16])
}
