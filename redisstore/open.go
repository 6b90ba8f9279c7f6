package redisstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/deadline"
)

// Open connects to the servers that the URL names, looks at them, and returns a store that uses them:
//
//	redis://user:password@host:6379/2                    one server, and its database 2
//	rediss://host:6379                                   the same, over TLS
//	redis://host1:6379,host2:6379                        a cluster, of which some servers are named
//	redis://host:6379?cluster=true                       a cluster, by one of its servers
//	redis+sentinel://host1:26379,host2:26379/primary/2   the primary of that name, as Sentinels know it
//
// A URL for Sentinels may have the parameters sentinel_username and sentinel_password.
//
// TLS goes by the system's certificates; for others, make a client and use [New].
//
// Open fails if no server can be reached, because it could not say then what the servers are like. A program that starts while its
// server is away calls Open again, or begins with an engine without a store. Open also fails if a server refuses scripts. It logs a
// warning for a server that may evict keys, or that keeps nothing on disk. It has the servers load the store's scripts, so that the first
// flows do not have to. The context bounds Open, not the store.
//
// A store of one server has two connections to it: one for a call at a time that no other call is under way with, and one for all others.
//
// A connection ends if the server sends a reply of more than 64 MiB, one that is malformed, or one that belongs to no command. So a server
// cannot end the process, or take its memory.
func Open(ctx context.Context, url string, opts ...Option) (*Store, error) {
	s, err := open(ctx, url, opts)
	if err != nil {
		return nil, deadline.Errorf("headgate: redisstore: open: %w", err)
	}
	return s, nil
}

func open(ctx context.Context, url string, opts []Option) (*Store, error) {
	o, err := parseURL(url)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	l := &link{bound: ctx}
	defer l.opened()
	o.DialCtxFn = l.dial
	client, err := rueidis.NewClient(o)
	if err != nil {
		if client != nil {
			client.Close()
		}
		return nil, cmp.Or(ctx.Err(), err)
	}
	var own *lone
	if o.ForceSingleClient {
		if own, err = newLone(o, l); err != nil {
			client.Close()
			return nil, cmp.Or(ctx.Err(), err)
		}
	}
	s, err := newStore(client, own, opts)
	if err != nil {
		client.Close()
		if own != nil {
			own.client.Close()
		}
		return nil, err
	}
	s.owned = true
	if err := s.look(ctx, o.ForceSingleClient); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// lookTimeout bounds each question of look.
const lookTimeout = 5 * time.Second

// look finds out what the servers are like. An error means that they cannot keep limits.
func (s *Store) look(ctx context.Context, alone bool) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	for _, client := range s.client.Nodes() {
		info, err := client.Do(unbounded{ctx}, client.B().Info().Build()).ToString()
		if err != nil {
			s.logger.Info("headgate: the store's server does not tell about itself, so it is not known whether it evicts keys, and what it keeps on disk",
				"error", err)
			continue
		}
		if err := s.judge(parseInfo(info), alone); err != nil {
			return err
		}
	}
	reply, err := s.run(unbounded{ctx}, s.scripts.probe, []string{"{" + s.namespace + "}#check"}, nil)
	switch {
	case err != nil:
		return fmt.Errorf("the server does not run scripts: %w", err)
	case len(reply) != 8:
		return fmt.Errorf("the server does not run scripts: %w", errReply)
	}
	now := time.Now()
	for _, sh := range s.shards() {
		sh.learn(floatAt(reply), s.micros(now), s.micros(now))
	}
	s.load(ctx)
	return nil
}

// load has all servers know the scripts, so that the first flows do not have to send them: that is a second round trip, within one bound.
// A server that refuses gets each script when a flow first needs it.
func (s *Store) load(ctx context.Context) {
	for _, client := range s.client.Nodes() {
		var commands []rueidis.Completed
		for _, sc := range s.scripts.all() {
			commands = append(commands, client.B().ScriptLoad().Script(sc.text).Build())
		}
		client.DoMulti(unbounded{ctx}, commands...)
	}
}

// judge logs what is wrong with a server, and returns an error for one that cannot be used so.
func (s *Store) judge(info map[string]string, alone bool) error {
	if alone && info["redis_mode"] == "cluster" {
		return errors.New("the server is part of a cluster: the URL must name several of its servers, or say cluster=true")
	}
	switch policy := info["maxmemory_policy"]; {
	case policy == "":
		s.logger.Info("headgate: it is not known whether the store's server evicts keys")
	case policy != "noeviction":
		s.logger.Warn("headgate: the store's server evicts keys when its memory is full, and limits whose keys are gone begin anew: "+
			"its maxmemory-policy should be noeviction", "maxmemory_policy", policy)
	}
	switch aof := info["aof_enabled"]; aof {
	case "":
		s.logger.Info("headgate: it is not known whether the store's server keeps an append-only file")
	case "0":
		s.logger.Warn("headgate: the store's server keeps no append-only file: when it restarts, limits may begin anew")
	}
	return nil
}

// parseInfo reads the answer of INFO.
func parseInfo(text string) map[string]string {
	info := make(map[string]string)
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			info[name] = value
		}
	}
	return info
}
