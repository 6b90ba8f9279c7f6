package redisstore

import (
	"slices"
	"strings"
	"testing"
)

func TestParseURL(t *testing.T) {
	type parsed struct {
		hosts, user, password, primary string
		db                             int
		tls, alone                     bool
	}
	for _, tt := range []struct {
		url  string
		want parsed
	}{
		{"redis://localhost", parsed{hosts: "localhost:6379", alone: true}},
		{"redis://localhost:1234/", parsed{hosts: "localhost:1234", alone: true}},
		{"redis://u:p@h/3", parsed{hosts: "h:6379", user: "u", password: "p", db: 3, alone: true}},
		{"redis://:p%40%2F@h", parsed{hosts: "h:6379", password: "p@/", alone: true}},
		{"rediss://h:1", parsed{hosts: "h:1", tls: true, alone: true}},
		{"redis://[::1]:1", parsed{hosts: "[::1]:1", alone: true}},
		{"redis://a:1,b:2,[::1]", parsed{hosts: "a:1,b:2,[::1]:6379"}},
		{"redis://a?cluster=true", parsed{hosts: "a:6379"}},
		{"redis://a/0?cluster=true", parsed{hosts: "a:6379"}},
		{"redis+sentinel://a,b:2/main", parsed{hosts: "a:26379,b:2", primary: "main"}},
		{"redis+sentinel://u:p@a/main/2?sentinel_password=x", parsed{hosts: "a:26379", user: "u", password: "p", primary: "main", db: 2}},
	} {
		o, err := parseURL(tt.url)
		got := parsed{strings.Join(o.InitAddress, ","), o.Username, o.Password, o.Sentinel.MasterSet, o.SelectDB, o.TLSConfig != nil, o.ForceSingleClient}
		if err != nil || got != tt.want {
			t.Errorf("parseURL(%q) = %+v, %v want %+v", tt.url, got, err, tt.want)
		}
		if !o.DisableRetry || !o.AlwaysPipelining || !o.DisableCache {
			t.Errorf("parseURL(%q) = a client that retries, caches, or does not pipeline", tt.url)
		}
	}
}

func badURLs() []string {
	return []string{
		"", "localhost:6379", "http://h", "redis://", "redis://:s3cret", "redis://h:s3cret", "redis://u:s3cret@h:0", "redis://u:s3cret@h:70000",
		"redis://u:s3cret@", "redis://u:s3cret@a,,b", "redis://u:s3cret@h/x", "redis://u:s3cret@h?cluster=maybe", "redis://u:s3cret@h?what=1",
		"redis://u:s3cret@a,b?cluster=false", "redis://u:s3cret@a,b/1", "redis+sentinel://u:s3cret@h", "redis://u:s3cret%zz@h",
		"redis://u:s3cret@h#x", "redis://[::1", "redis://u:s3cret@[x]:1", "redis://u:s3/cret@h", "redis://h?cluster=true&cluster=true",
		"redis://h?sentinel_password=s3cret", "redis://h/1/2", "redis://a:b:c",
	}
}

// Errors do not quote what may be a password.
func TestParseURLFails(t *testing.T) {
	for _, url := range badURLs() {
		if o, err := parseURL(url); err == nil {
			t.Errorf("parseURL(%q) = %v want an error", url, o.InitAddress)
		} else if strings.Contains(err.Error(), "s3") || strings.Contains(err.Error(), "cret") {
			t.Errorf("parseURL(%q) = %v, which quotes the password", url, err)
		}
	}
}

func FuzzParseURL(f *testing.F) {
	for _, url := range badURLs() {
		f.Add(url)
	}
	f.Add("redis://u:p@a:1,[::1]:2/0?cluster=true")
	f.Add("rediss+sentinel://a,b/main/2?sentinel_username=u")
	f.Fuzz(func(t *testing.T, url string) {
		o, err := parseURL(url)
		if err != nil {
			return
		}
		if len(o.InitAddress) == 0 || slices.Contains(o.InitAddress, "") || !o.DisableRetry {
			t.Errorf("parseURL(%q) = %+v", url, o)
		}
		if one := len(o.InitAddress) == 1; o.ForceSingleClient && !one {
			t.Errorf("parseURL(%q) = one server of %d", url, len(o.InitAddress))
		}
	})
}
