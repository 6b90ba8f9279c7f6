package redisstore

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"strings"

	"github.com/headgate-go/headgate/internal/credential"
	"github.com/headgate-go/headgate/internal/shared"
)

// maxValue is the longest label value that is part of a key's name, in bytes. Of a longer one, the name has so many bytes less those
// of a code, and the code.
const (
	maxValue    = 64
	shortPrefix = 40
)

// A name is what a key's states are kept by. Redis has them in one slot of its cluster, since they all begin with the same tag in
// braces:
//
//	{<namespace>:<label>=<value>}:<policy>/<component>
//
// Without a label the tag is <namespace>:<policy>/<component>, so that not all of them are in one slot. A bucket or a quota is
// kept by the name itself. Others end in one of the suffixes below.
type name struct {
	tag string // with its braces
	all string
}

const (
	suffixSlots  = "#s" // a hash of slots
	suffixEnds   = "#x" // a sorted set of when they run out
	suffixLeases = "#l" // a sorted set of when leases of holders run out, beside a tag
	suffixQueue  = "#q" // the boxes of a queue
)

// name returns the name of a key.
func (s *Store) name(k shared.Key) name {
	policy, component := escape(k.Policy), escape(k.Component)
	if k.Label == "" {
		all := "{" + s.namespace + ":" + policy + "/" + component + "}:" + policy + "/" + component
		return name{all[:len(s.namespace)+len(policy)+len(component)+4], all}
	}
	label, value := escape(k.Label), s.value(k.Label, k.Value)
	all := "{" + s.namespace + ":" + label + "=" + value + "}:" + policy + "/" + component
	return name{all[:len(s.namespace)+len(label)+len(value)+4], all}
}

// value returns what stands for a label's value. Credentials are hidden.
func (s *Store) value(label, value string) string {
	switch {
	case credential.Named(label):
		code := hmac.New(sha256.New, s.secret())
		_, _ = code.Write([]byte(value))
		return "hidden#" + hex.EncodeToString(code.Sum(nil)[:16])
	case len(value) > maxValue:
		sum := sha256.Sum256([]byte(value))
		return escape(value[:shortPrefix]) + "#" + hex.EncodeToString(sum[:16])
	default:
		return escape(value)
	}
}

// escape makes text such that it ends no tag, and is none of the characters between the parts of a name. Different texts stay
// different.
func escape(text string) string {
	const special = "%{}/=\x00"
	if !strings.ContainsAny(text, special) {
		return text
	}
	var b strings.Builder
	for i := range len(text) {
		if c := text[i]; strings.IndexByte(special, c) >= 0 {
			b.WriteByte('%')
			b.WriteString(hex.EncodeToString([]byte{c}))
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// leases returns the key of the leases that slots of a name go by. A script may read keys of one cluster slot only, so in a cluster
// there are leases beside each tag.
func (s *Store) leases(n name) string {
	if s.cluster {
		return n.tag + suffixLeases
	}
	return "{" + s.namespace + "}" + suffixLeases
}

// instances returns the key of the instances that use the store.
func (s *Store) instancesKey() string { return "{" + s.namespace + "}#instances" }

// sessionKey returns the key of the tags beside which a session holds slots.
func (s *Store) sessionKey(h shared.Holder) string {
	return "{" + s.namespace + ":session:" + hex.EncodeToString(h[:]) + "}"
}

// cacheName returns the key of a cached value.
func (s *Store) cacheName(k shared.CacheKey) string {
	sum := sha256.Sum256([]byte(strconv.Itoa(len(k.ControlPoint)) + ":" + k.ControlPoint + k.Key)) // so that no two names run together
	return s.namespace + ":cache:" + hex.EncodeToString(sum[:16])
}

// slotOf returns the cluster slot of a tag in braces.
func slotOf(tag string) uint16 {
	var crc uint16 // CRC-16/XMODEM
	for i := 1; i < len(tag)-1; i++ {
		crc ^= uint16(tag[i]) << 8
		for range 8 {
			if crc&0x8000 != 0 {
				crc = crc<<1 ^ 0x1021
			} else {
				crc <<= 1
			}
		}
	}
	return crc % slotCount
}

// slotCount is how many slots a cluster has.
const slotCount = 16384
