package redistest

import (
	"fmt"
	"strconv"
	"strings"
)

// slots is how many slots a cluster has.
const slots = 16384

// A Cluster is some servers that have a part of the keys each, and no replicas.
type Cluster struct {
	Servers []*Server
	tb      TB
}

// StartCluster starts a cluster of three, which have about a third of the slots each, and waits until all of them know this.
func StartCluster(tb TB, o Options) *Cluster {
	tb.Helper()
	const size = 3
	c := &Cluster{tb: tb}
	for range size {
		c.Servers = append(c.Servers, start(tb, o,
			"--cluster-enabled", "yes", "--cluster-config-file", "nodes", "--cluster-node-timeout", "2000",
			"--cluster-require-full-coverage", "no", // so that a server that is gone costs its own keys only
		))
	}
	for i, s := range c.Servers {
		s.Text("CLUSTER", "ADDSLOTSRANGE", strconv.Itoa(i*slots/size), strconv.Itoa((i+1)*slots/size-1))
		s.Text("CLUSTER", "SET-CONFIG-EPOCH", strconv.Itoa(i+1))
		if i > 0 {
			s.Text("CLUSTER", "MEET", "127.0.0.1", strconv.Itoa(c.Servers[0].port), strconv.Itoa(c.Servers[0].bus))
		}
	}
	c.Await()
	return c
}

// URL returns where the cluster is: the hosts of all servers.
func (c *Cluster) URL() string {
	hosts := make([]string, len(c.Servers))
	for i, s := range c.Servers {
		hosts[i] = s.Addr()
	}
	return c.Servers[0].at("redis", strings.Join(hosts, ","))
}

// Await waits until all servers run, know each other, and agree on who has which slot.
func (c *Cluster) Await() {
	c.tb.Helper()
	for _, s := range c.Servers {
		s.await("a cluster that is whole", func() bool {
			info, err := s.Do("CLUSTER", "INFO")
			if err != nil || !strings.Contains(text(info), "cluster_state:ok") || !strings.Contains(text(info), fmt.Sprintf("cluster_slots_ok:%d", slots)) {
				return false
			}
			view, err := c.view(s)
			if err != nil || strings.Count(view, "\n") != len(c.Servers) {
				return false
			}
			first, err := c.view(c.Servers[0])
			return err == nil && view == first
		})
	}
}

// view returns which servers a server knows, by their names, and which slots it takes them to have.
func (c *Cluster) view(of *Server) (string, error) {
	nodes, err := of.Do("CLUSTER", "NODES")
	if err != nil {
		return "", err
	}
	view := map[string]string{}
	for line := range strings.Lines(text(nodes)) {
		fields := strings.Fields(line)
		if len(fields) < 8 || fields[7] != "connected" || strings.Contains(fields[2], "fail") || strings.Contains(fields[2], "handshake") {
			continue
		}
		view[fields[0]] = strings.Join(fields[8:], " ")
	}
	var b strings.Builder
	for _, s := range c.Servers {
		id, err := s.Do("CLUSTER", "MYID")
		if err != nil {
			return "", err
		}
		if ranges, known := view[text(id)]; known {
			fmt.Fprintln(&b, text(id), ranges)
		}
	}
	return b.String(), nil
}

// Slot returns the slot of a key.
func (c *Cluster) Slot(key string) int {
	c.tb.Helper()
	slot, err := strconv.Atoi(c.Servers[0].Text("CLUSTER", "KEYSLOT", key))
	if err != nil {
		c.tb.Fatalf("redistest: %v", err)
	}
	return slot
}

// Owner returns the server that has a slot.
func (c *Cluster) Owner(slot int) *Server {
	c.tb.Helper()
	for _, s := range c.Servers {
		answer, err := s.Do("CLUSTER", "SLOTS")
		if err != nil {
			continue // it may be killed
		}
		ranges, _ := answer.([]any)
		for _, r := range ranges {
			r, _ := r.([]any)
			if len(r) < 3 {
				continue
			}
			first, _ := r[0].(int64)
			last, _ := r[1].(int64)
			node, _ := r[2].([]any)
			if int64(slot) < first || int64(slot) > last || len(node) < 2 {
				continue
			}
			for _, owner := range c.Servers {
				if port, _ := node[1].(int64); int64(owner.port) == port {
					return owner
				}
			}
		}
	}
	c.tb.Fatalf("redistest: no server has slot %d", slot)
	return nil
}

// Other returns a server that is not this one.
func (c *Cluster) Other(than *Server) *Server {
	for _, s := range c.Servers {
		if s != than {
			return s
		}
	}
	return nil
}

// Move moves a slot with its keys to another server, and waits until all know it.
func (c *Cluster) Move(slot int, to *Server) {
	c.tb.Helper()
	m := c.Begin(slot, to)
	for m.Key() {
	}
	m.End()
}

// A Migration is a slot that is on its way: its old server has some of the keys, its new one the others.
type Migration struct {
	c        *Cluster
	slot     string
	from, to *Server
}

// Begin begins to move a slot to another server. No key has moved yet.
func (c *Cluster) Begin(slot int, to *Server) *Migration {
	c.tb.Helper()
	m := &Migration{c: c, slot: strconv.Itoa(slot), from: c.Owner(slot), to: to}
	if m.from == to {
		c.tb.Fatalf("redistest: the server has slot %d", slot)
	}
	to.Text("CLUSTER", "SETSLOT", m.slot, "IMPORTING", m.from.Text("CLUSTER", "MYID"))
	m.from.Text("CLUSTER", "SETSLOT", m.slot, "MIGRATING", to.Text("CLUSTER", "MYID"))
	return m
}

// Key moves one key of the slot, and reports whether there was one.
func (m *Migration) Key() bool {
	m.c.tb.Helper()
	key := m.from.Text("CLUSTER", "GETKEYSINSLOT", m.slot, "1")
	if key == "" {
		return false
	}
	args := []string{"MIGRATE", "127.0.0.1", strconv.Itoa(m.to.port), "", "0", "60000"}
	if m.to.o.Password != "" {
		args = append(args, "AUTH", m.to.o.Password)
	}
	m.from.Text(append(args, "KEYS", key)...)
	return true
}

// End ends the move, for which all keys must have moved.
func (m *Migration) End() {
	m.c.tb.Helper()
	id := m.to.Text("CLUSTER", "MYID")
	m.to.Text("CLUSTER", "SETSLOT", m.slot, "NODE", id)
	for _, s := range m.c.Servers {
		s.Text("CLUSTER", "SETSLOT", m.slot, "NODE", id)
	}
	m.c.Await()
}
