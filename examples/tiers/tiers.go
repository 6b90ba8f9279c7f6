package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/labels"
)

// A key is what the service knows of an API key.
type key struct{ id, tier string }

// A service is an API for callers with keys, within the limits of a file.
type service struct {
	api, admin http.Handler // admin is not for callers
	rpc        *grpc.Server

	limits *engine.Engine
	client *flowctl.Client
}

// newService follows the file of limits until ctx ends or the service is closed.
func newService(
	ctx context.Context, api http.Handler, keys map[string]key, limitsFile string, watch engine.WatchParams, logger *slog.Logger,
) (*service, error) {
	registry := prometheus.NewRegistry()
	exporter, err := otelprom.New(otelprom.WithRegisterer(registry), otelprom.WithoutScopeInfo(), otelprom.WithoutTargetInfo())
	if err != nil {
		return nil, err
	}
	limits, err := engine.New(nil, engine.WithLogger(logger)) // the policies are those that Watch reads
	if err != nil {
		return nil, err
	}
	client, err := flowctl.New(limits, flowctl.WithLogger(logger),
		flowctl.WithMeterProvider(metric.NewMeterProvider(metric.WithReader(exporter))))
	if err != nil {
		return nil, errors.Join(err, limits.Close())
	}
	s := &service{limits: limits, client: client}
	if err := limits.Watch(ctx, limitsFile, watch); err != nil {
		return nil, errors.Join(err, s.close(ctx))
	}

	s.api = authenticated(keys, httpguard.Middleware(client, "api", httpguard.WithRateLimitHeaders())(api))
	s.rpc = grpc.NewServer(grpc.WaitForHandlers(true), // streams would need interceptors of their own
		grpc.ChainUnaryInterceptor(authenticatedRPC(keys), grpcguard.UnaryServerInterceptor(client, "api")))
	admin := http.NewServeMux()
	admin.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	admin.HandleFunc("GET /limited", s.limited)
	s.admin = admin
	return s, nil
}

// close is for the end, when no request is under way.
func (s *service) close(ctx context.Context) error {
	return errors.Join(s.client.Close(ctx), s.limits.Close())
}

// known labels what is done for a key. Limits go by these labels, and callers cannot set them.
func known(ctx context.Context, k key) context.Context {
	return labels.With(ctx, "key_id", k.id, "tier", k.tier)
}

// authenticated refuses requests without a key: flows without labels would pass unlimited.
func authenticated(keys map[string]key, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k, ok := keys[r.Header.Get("X-API-Key")]
		if !ok {
			http.Error(w, "no such key", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r.WithContext(known(r.Context(), k)))
	})
}

// authenticatedRPC does so for gRPC.
func authenticatedRPC(keys map[string]key) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		k, ok := keys[strings.Join(metadata.ValueFromIncomingContext(ctx, "x-api-key"), ",")]
		if !ok {
			return nil, status.Error(codes.Unauthenticated, "no such key")
		}
		return handle(known(ctx, k), req)
	}
}

// A row says how often a limit has rejected a key, or would have without its dry run.
type row struct {
	Limit  string
	DryRun bool
	engine.TopValue
}

// limited lists the keys that are rejected most, for each limit.
func (s *service) limited(w http.ResponseWriter, _ *http.Request) {
	rows := []row{}
	for _, c := range s.limits.Stats().Components {
		component, err := s.limits.Component(c.Policy, c.ID)
		if err != nil {
			continue // the file has changed since
		}
		for _, top := range component.Top() {
			rows = append(rows, row{c.ID, c.DryRun, top})
		}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(rows)
}
