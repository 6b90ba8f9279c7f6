package redistest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Primary is the name by which Sentinels know the primary.
const Primary = "primary"

// A Replicated is a primary with its replica, and Sentinels that make the replica the primary when the primary is gone.
type Replicated struct {
	Servers   [2]*Server // the primary at first, and the replica at first
	Sentinels []*Server
	tb        TB
	o         Options
}

// StartReplicated starts a primary, its replica and so many Sentinels, most of which have to agree. It waits until all know each other.
func StartReplicated(tb TB, o Options, sentinels int) *Replicated {
	tb.Helper()
	r := &Replicated{tb: tb, o: o}
	r.Servers[0] = start(tb, o)
	r.Servers[1] = start(tb, o, "--replicaof", "127.0.0.1 "+strconv.Itoa(r.Servers[0].port))
	r.Servers[1].await("replica that is in step", func() bool {
		info, err := r.Servers[1].Do("INFO", "replication")
		return err == nil && strings.Contains(text(info), "master_link_status:up")
	})
	for range sentinels {
		r.Sentinels = append(r.Sentinels, r.sentinel(sentinels/2+1))
	}
	for _, s := range r.Sentinels {
		s.await("Sentinel that knows all", func() bool {
			replicas, err := s.Do("SENTINEL", "REPLICAS", Primary)
			if list, _ := replicas.([]any); err != nil || len(list) != 1 {
				return false
			}
			others, err := s.Do("SENTINEL", "SENTINELS", Primary)
			list, _ := others.([]any)
			return err == nil && len(list) == sentinels-1
		})
	}
	return r
}

func (r *Replicated) sentinel(quorum int) *Server {
	r.tb.Helper()
	file := filepath.Join(r.tb.TempDir(), "sentinel.conf") // Sentinels write to it
	primary := r.Servers[0]
	lines := []string{
		"sentinel monitor " + Primary + " 127.0.0.1 " + strconv.Itoa(primary.port) + " " + strconv.Itoa(quorum),
		"sentinel down-after-milliseconds " + Primary + " 1000",
		"sentinel failover-timeout " + Primary + " 5000",
	}
	if r.o.Password != "" {
		lines = append(lines, "sentinel auth-pass "+Primary+" "+r.o.Password)
	}
	if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		r.tb.Fatalf("redistest: %v", err)
	}
	return start(r.tb, Options{}, file, "--sentinel")
}

// URL returns where the Sentinels are, and how they name the primary, with its password.
func (r *Replicated) URL() string {
	hosts := make([]string, len(r.Sentinels))
	for i, s := range r.Sentinels {
		hosts[i] = s.Addr()
	}
	return r.Servers[0].at("redis+sentinel", strings.Join(hosts, ",")) + "/" + Primary
}

// Primary returns the server that the Sentinels take for the primary, and the other.
func (r *Replicated) Primary() (primary, other *Server) {
	r.tb.Helper()
	addr := r.Sentinels[0].Text("SENTINEL", "GET-MASTER-ADDR-BY-NAME", Primary)
	if strings.HasSuffix(addr, "\n"+strconv.Itoa(r.Servers[1].port)) {
		return r.Servers[1], r.Servers[0]
	}
	return r.Servers[0], r.Servers[1]
}

// InStep waits until the replica has all that the primary has.
func (r *Replicated) InStep() {
	r.tb.Helper()
	primary, other := r.Primary()
	primary.await("replica that is in step", func() bool {
		theirs, err := primary.Do("INFO", "replication")
		if err != nil {
			return false
		}
		its, err := other.Do("INFO", "replication")
		const offset = "master_repl_offset:"
		return err == nil && strings.Contains(text(its), "master_link_status:up") && field(text(theirs), offset) == field(text(its), offset)
	})
}

// field returns the rest of the line that begins so.
func field(text, begins string) string {
	for line := range strings.Lines(text) {
		if rest, found := strings.CutPrefix(line, begins); found {
			return rest
		}
	}
	return ""
}

// Failover waits until the other server than this one is the primary, for all Sentinels and by itself. The old one must be killed or
// stopped.
func (r *Replicated) Failover(old *Server) (next *Server) {
	r.tb.Helper()
	next = r.Servers[0]
	if next == old {
		next = r.Servers[1]
	}
	next.await("failover", func() bool {
		for _, s := range r.Sentinels {
			addr, err := s.Do("SENTINEL", "GET-MASTER-ADDR-BY-NAME", Primary)
			if err != nil || !strings.HasSuffix(text(addr), "\n"+strconv.Itoa(next.port)) {
				return false
			}
		}
		role, err := next.Do("ROLE")
		return err == nil && strings.HasPrefix(text(role), "master\n")
	})
	return next
}
