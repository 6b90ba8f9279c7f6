package flowctl

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"

	"github.com/headgate-go/headgate/internal/version"
)

// Dial makes a client of an agent that speaks the Aperture protocol over gRPC. The address is host:port, or any target
// that gRPC knows; the connection uses TLS unless [WithInsecure] says otherwise. Dial does not wait for the connection:
// see [Client.Ready].
func Dial(address string, opts ...Option) (*Client, error) {
	cfg, err := newConfig(true, opts)
	if err != nil {
		return nil, fmt.Errorf("headgate: dial: %w", err)
	}
	return dial(address, cfg)
}

func dial(address string, cfg *config) (*Client, error) {
	r, err := newRemote(address, cfg)
	if err != nil {
		return nil, fmt.Errorf("headgate: dial: %w", err)
	}
	c, err := newClient(r, cfg)
	if err != nil {
		return nil, errors.Join(err, r.release())
	}
	c.remote = r
	r.start(cfg)
	return c, nil
}

func newRemote(address string, cfg *config) (*remote, error) {
	r := &remote{
		conn:     cfg.conn,
		timeout:  cfg.endTimeout,
		codec:    boundedCodec{encoding.GetCodecV2(protocodec.Name)},
		received: new(atomic.Uint64),
		logger:   cfg.logger,
	}
	r.session = newSession(r)
	span := cfg.checkTimeout
	if span < 0 {
		span = defaultCheckTimeout
	}
	r.breaker = newBreaker(cfg.breaker, span)
	r.address = shownAddress(address)
	if conn, ok := cfg.conn.(interface{ Target() string }); ok {
		r.address = shownAddress(conn.Target())
	}
	plaintextKey := cfg.plaintextKey
	if cfg.conn != nil {
		if address != "" {
			return nil, errors.New("WithConn brings the connection: the address must be empty")
		}
	} else {
		if err := checkAddress(address, cfg); err != nil {
			return nil, err
		}
		creds := transportCredentials(cfg)
		if creds.Info().SecurityProtocol == "insecure" {
			plaintextKey = plaintextKey || isLoopback(address)
			if cfg.apiKey != "" && !plaintextKey {
				err := errors.New("the API key would travel in plaintext: use TLS, or WithInsecureAPIKey")
				if cfg.plaintextEnv != "" {
					err = fmt.Errorf("%s: %w", cfg.plaintextEnv, err)
				}
				return nil, err
			}
		}
		r.links = newConnections(r.received)
		opts := append([]grpc.DialOption{
			grpc.WithTransportCredentials(&trackedCredentials{creds, r.links}),
			grpc.WithKeepaliveParams(cfg.keepalive),
			grpc.WithConnectParams(connectParams(r.breaker)),
			grpc.WithUserAgent("headgate-go/" + version.Version),
			grpc.WithMaxHeaderListSize(maxHeaderList),
			grpc.WithDisableRetry(), // a service config could ask for retries of checks, also one from DNS
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxCachedAnswer)),
		}, cfg.dialOptions...)
		conn, err := grpc.NewClient(address, opts...)
		if err != nil {
			return nil, err
		}
		conn.Connect() // so that the first flow need not wait for it
		r.conn, r.dialled = conn, conn
	}
	r.calls = []grpc.CallOption{grpc.StaticMethod()}
	if r.ownKey = cfg.apiKey != ""; r.ownKey {
		r.calls = append(r.calls, grpc.PerRPCCredentials(&keyCredentials{
			metadata:  map[string]string{keyHeader: cfg.apiKey},
			plaintext: plaintextKey,
		}))
	}
	r.vigil.remote = r
	r.bounded = append(slices.Clone(r.calls), grpc.ForceCodecV2(r.codec), grpc.MaxCallRecvMsgSize(maxAnswer))
	return r, nil
}

// connectParams bounds the pauses between attempts to connect by the time between two probes of the breaker. With
// gRPC's own bound of two minutes, a probe or a Ready would fail without an attempt. ClientConn.ResetConnectBackoff,
// which is meant for that, races with new addresses (grpc-go 1.85).
func connectParams(g *breaker) grpc.ConnectParams {
	pauses := backoff.DefaultConfig
	pauses.MaxDelay = max(min(g.Probe, pauses.MaxDelay), time.Second)
	pauses.BaseDelay = min(pauses.BaseDelay, pauses.MaxDelay)
	return grpc.ConnectParams{Backoff: pauses, MinConnectTimeout: 20 * time.Second}
}
