package flowctl

import (
	"errors"
	"net"
	"strconv"
	"strings"

	"google.golang.org/grpc/resolver"
)

// checkAddress returns what is wrong with the address. A valid one is host:port, or a target with a scheme that gRPC
// knows. gRPC takes an unknown scheme for the name of a host, and never finds it. The errors do not show the address,
// which may hold secrets.
func checkAddress(address string, cfg *config) error {
	if address == "" {
		return errors.New("the address is empty")
	}
	scheme, rest, _ := strings.Cut(address, ":")
	switch known := resolver.Get(scheme) != nil; {
	case known:
		return nil
	case strings.HasPrefix(rest, "//") && (len(cfg.dialOptions) == 0 || strings.HasPrefix(scheme, "http")):
		return errors.New("the address is a URL, or has a scheme that gRPC does not know")
	case strings.HasPrefix(rest, "//"):
		return nil // for a resolver in the options
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return errors.New("the address is not host:port")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return errors.New("the address has no port from 1 to 65535")
	}
	if strings.ContainsAny(host, " /\\@") {
		return errors.New("the address has a host that cannot be one")
	}
	return nil
}

// shownAddress returns what metrics show of a target, by which they tell agents apart: host and port, or the path of a socket. It is empty
// for a scheme of the application's own, whose targets may hold secrets.
func shownAddress(target string) string {
	if _, port, err := net.SplitHostPort(target); err == nil {
		if _, err := strconv.ParseUint(port, 10, 16); err == nil {
			return target
		}
	}
	scheme, rest, _ := strings.Cut(target, ":")
	switch scheme {
	case "unix", "unix-abstract":
		return scheme + ":" + strings.TrimPrefix(rest, "//")
	case "dns", "passthrough", "ipv4", "ipv6":
		if after, ok := strings.CutPrefix(rest, "//"); ok { // a server of names may be before the slash
			_, rest, _ = strings.Cut(after, "/")
		}
		if !strings.ContainsAny(rest, "@/?#") {
			return rest
		}
	}
	return ""
}

// isLoopback reports whether the target can only be this machine.
func isLoopback(target string) bool {
	if strings.HasPrefix(target, "unix:") || strings.HasPrefix(target, "unix-abstract:") {
		return true
	}
	for _, scheme := range []string{"dns:///", "passthrough:///", "dns:", "passthrough:"} {
		if rest, ok := strings.CutPrefix(target, scheme); ok {
			target = rest
			break
		}
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		host = target
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
