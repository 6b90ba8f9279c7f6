package redisstore

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/redis/rueidis"
)

const (
	defaultPort         = "6379"
	defaultSentinelPort = "26379"

	dialTimeout  = 2 * time.Second
	writeTimeout = time.Second // after which a connection without answers is given up
	bufferSize   = 64 << 10

	// sentinelPeriod is how often Sentinels are asked for the primary, in case one of their messages was lost.
	sentinelPeriod = 5 * time.Second
)

// parseURL returns the client's options for a URL. Errors do not quote the URL, which may have a password.
func parseURL(text string) (rueidis.ClientOption, error) {
	o := rueidis.ClientOption{
		AlwaysPipelining:    true,
		DisableCache:        true,
		DisableRetry:        true,
		PipelineMultiplex:   -1, // one connection, so that a server gets calls in their order
		ConnWriteTimeout:    writeTimeout,
		ReadBufferEachConn:  bufferSize,
		WriteBufferEachConn: bufferSize,
	}
	o.Dialer.Timeout = dialTimeout
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok {
		return o, errors.New("the URL has no scheme: want redis://host:port or the like")
	}
	secure, sentinel := false, false
	switch strings.ToLower(scheme) {
	case "redis":
	case "rediss":
		secure = true
	case "redis+sentinel":
		sentinel = true
	case "rediss+sentinel":
		secure, sentinel = true, true
	default:
		return o, errors.New("the URL's scheme is none of redis, rediss, redis+sentinel, and rediss+sentinel")
	}
	if secure {
		o.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	if err := parseAuthority(&o, rest[:end], sentinel); err != nil {
		return o, err
	}
	tail, err := url.Parse("redis://host" + rest[end:])
	if err != nil || tail.Fragment != "" {
		return o, errors.New("what follows the URL's hosts is neither a path nor parameters")
	}
	return o, parseTail(&o, tail, sentinel)
}

// parseAuthority reads the user, the password and the hosts.
func parseAuthority(o *rueidis.ClientOption, authority string, sentinel bool) error {
	hosts := authority
	if i := strings.LastIndexByte(authority, '@'); i >= 0 {
		user, password, _ := strings.Cut(authority[:i], ":")
		hosts = authority[i+1:]
		var err, err2 error
		o.Username, err = url.PathUnescape(user)
		o.Password, err2 = url.PathUnescape(password)
		if err != nil || err2 != nil {
			return errors.New("the URL's user or password is not escaped as it must be")
		}
	}
	port := defaultPort
	if sentinel {
		port = defaultSentinelPort
	}
	for i, host := range strings.Split(hosts, ",") {
		address, err := parseHost(host, port)
		if err != nil {
			return fmt.Errorf("host %d of the URL: %w", i+1, err)
		}
		o.InitAddress = append(o.InitAddress, address)
	}
	return nil
}

func parseHost(host, port string) (string, error) {
	name := host
	if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') {
		name, port = host[:i], host[i+1:]
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", errors.New("its port is not a number from 1 to 65535")
	}
	if inner, ok := strings.CutPrefix(name, "["); ok {
		if name, ok = strings.CutSuffix(inner, "]"); !ok || net.ParseIP(name) == nil {
			return "", errors.New("what is in brackets is no IPv6 address")
		}
	}
	switch {
	case name == "":
		return "", errors.New("it is empty")
	case strings.ContainsAny(name, "[]@% \t\r\n") || strings.Contains(name, ":") && net.ParseIP(name) == nil:
		return "", errors.New("it is no host name")
	}
	return net.JoinHostPort(name, port), nil
}

// parseTail reads the path and the parameters.
func parseTail(o *rueidis.ClientOption, tail *url.URL, sentinel bool) error {
	db, hasDB := strings.CutPrefix(tail.Path, "/")
	if sentinel {
		o.Sentinel.MasterSet, db, hasDB = strings.Cut(db, "/")
		if o.Sentinel.MasterSet == "" {
			return errors.New("the URL names no primary: want redis+sentinel://host:port/primary")
		}
		o.Sentinel.TLSConfig = o.TLSConfig
		o.Sentinel.Dialer = o.Dialer
		o.Sentinel.TopologyRefreshInterval = sentinelPeriod
	}
	query, err := url.ParseQuery(tail.RawQuery)
	if err != nil {
		return errors.New("the URL's parameters are not escaped as they must be")
	}
	cluster := len(o.InitAddress) > 1 && !sentinel
	for name, values := range query {
		value := values[len(values)-1]
		switch {
		case len(values) > 1:
			return fmt.Errorf("the URL has the parameter %q more than once", name)
		case name == "cluster" && !sentinel:
			is, err := strconv.ParseBool(value)
			if err != nil {
				return errors.New("the URL's parameter cluster is neither true nor false")
			}
			if cluster && !is {
				return errors.New("the URL has several hosts, so cluster cannot be false")
			}
			cluster = is
		case name == "sentinel_username" && sentinel:
			o.Sentinel.Username = value
		case name == "sentinel_password" && sentinel:
			o.Sentinel.Password = value
		default:
			return fmt.Errorf("the URL has an unknown parameter %q", name)
		}
	}
	if hasDB && db != "" {
		n, err := strconv.ParseUint(db, 10, 16)
		if err != nil {
			return errors.New("the database in the URL's path is not a number")
		}
		if cluster && n != 0 {
			return errors.New("a cluster has no database but 0")
		}
		o.SelectDB = int(n)
	}
	o.ForceSingleClient = !cluster && !sentinel
	return nil
}
