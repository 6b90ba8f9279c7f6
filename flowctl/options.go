package flowctl

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/labels"
)

// An Option configures a client. If an option is given several times, the last one counts, unless its comment says
// otherwise. [New] refuses options for the connection to an agent.
type Option interface {
	apply(*config) error
}

type option struct {
	name   string
	remote bool // makes sense for a remote agent only
	set    func(*config) error
}

func (o option) apply(c *config) error {
	if o.remote && !c.remote {
		return fmt.Errorf("%s: there is no connection to an embedded agent", o.name)
	}
	if err := o.set(c); err != nil {
		return fmt.Errorf("%s: %w", o.name, err)
	}
	return nil
}

// config is what the options come to.
type config struct {
	remote bool

	tls          *tls.Config
	creds        credentials.TransportCredentials
	insecure     bool
	apiKey       string
	plaintextKey bool
	plaintextEnv string // the environment variable to name in the error if the key would travel in plaintext
	keepalive    keepalive.ClientParameters
	dialOptions  []grpc.DialOption
	conn         grpc.ClientConnInterface
	noTelemetry  bool
	breaker      AgentBreaker
	endTimeout   time.Duration
	checkTimeout time.Duration
	shared       agentapi.Shared // what every flow of the client has
	baggage      bool
	baggageKeys  []string
	dryRun       bool
	logger       *slog.Logger
	onDecision   func(context.Context, *Flow)
	cancelLost   bool
	tracer       trace.TracerProvider
	meter        metric.MeterProvider
}

const (
	defaultCheckTimeout = 200 * time.Millisecond
	defaultEndTimeout   = time.Second
)

func newConfig(remote bool, opts []Option) (*config, error) {
	c := &config{
		remote: remote,
		// A default gRPC server ends connections that ping more often than every 5 minutes, and every check that
		// waits on them; the timeout bounds unacknowledged data as well, so that dead peers are found all the same.
		keepalive:    keepalive.ClientParameters{Time: 5 * time.Minute, Timeout: 5 * time.Second},
		checkTimeout: defaultCheckTimeout,
		endTimeout:   defaultEndTimeout,
		logger:       slog.New(slog.DiscardHandler),
	}
	var errs []error
	for _, o := range opts {
		if o != nil {
			errs = append(errs, o.apply(c))
		}
	}
	if c.insecure && (c.tls != nil || c.creds != nil) {
		errs = append(errs, errors.New("WithInsecure contradicts the TLS options"))
	}
	if c.tls != nil && c.creds != nil {
		errs = append(errs, errors.New("WithTLSConfig and WithTransportCredentials exclude each other"))
	}
	if c.conn != nil && (c.insecure || c.tls != nil || c.creds != nil || len(c.dialOptions) > 0) {
		errs = append(errs, errors.New("WithConn brings the connection: options that set one up have no effect"))
	}
	return c, errors.Join(errs...)
}

// WithTLSConfig sets up TLS. The default is TLS with the system's roots. The configuration is copied. An agent may send 64 KiB in its
// handshake, its certificates included.
func WithTLSConfig(t *tls.Config) Option {
	return option{"WithTLSConfig", true, func(c *config) error {
		if t == nil {
			return errors.New("no configuration")
		}
		c.tls = t.Clone()
		return nil
	}}
}

// WithTransportCredentials secures the connection with these credentials. It excludes [WithTLSConfig] and
// [WithInsecure].
func WithTransportCredentials(creds credentials.TransportCredentials) Option {
	return option{"WithTransportCredentials", true, func(c *config) error {
		if creds == nil {
			return errors.New("no credentials")
		}
		c.creds = creds
		return nil
	}}
}

// WithInsecure talks to the agent in plaintext: for agents on the same machine, or inside a mesh that encrypts.
func WithInsecure() Option {
	return option{"WithInsecure", true, func(c *config) error {
		c.insecure = true
		return nil
	}}
}

// WithAPIKey sends the key with every call to the agent, telemetry included, as x-api-key. An empty key is an error.
// The key replaces an x-api-key in the outgoing metadata of the caller's context; other metadata is still sent. In
// plaintext the key is sent to this machine only, unless [WithInsecureAPIKey] says otherwise.
func WithAPIKey(key string) Option {
	return option{"WithAPIKey", true, func(c *config) error {
		if err := checkAPIKey(key); err != nil {
			return err
		}
		c.apiKey = key
		return nil
	}}
}

// WithInsecureAPIKey lets the API key travel in plaintext to other machines. Anybody who sees the traffic can read it.
func WithInsecureAPIKey() Option {
	return option{"WithInsecureAPIKey", true, func(c *config) error {
		c.plaintextKey = true
		return nil
	}}
}

// WithKeepalive sets how an idle connection with waiting calls is probed. The default is a ping after 5 minutes, and
// 5 s for its answer; servers end connections that ping more often than they allow.
func WithKeepalive(p keepalive.ClientParameters) Option {
	return option{"WithKeepalive", true, func(c *config) error {
		c.keepalive = p
		return nil
	}}
}

// WithDialOptions adds gRPC's own options for the connection. They come after those of this package, and repeated use
// adds more. Transport credentials among them are an error: the [AgentBreaker] would not see late answers, and the
// client would not know whether an API key travels in plaintext. Use [WithTransportCredentials], [WithTLSConfig] or
// [WithInsecure] instead. An agent's compressed answer is refused unless the question was compressed, for example by
// grpc.UseCompressor among the default call options.
func WithDialOptions(opts ...grpc.DialOption) Option {
	opts = slices.Clone(opts)
	return option{"WithDialOptions", true, func(c *config) error {
		if setCredentials(opts) {
			return errors.New("there are transport credentials among them: use WithTransportCredentials, WithTLSConfig or WithInsecure")
		}
		c.dialOptions = append(c.dialOptions, opts...)
		return nil
	}}
}

// setCredentials reports whether the options bring transport credentials. The options cannot be inspected, but gRPC
// makes no client without credentials.
func setCredentials(opts []grpc.DialOption) bool {
	conn, err := grpc.NewClient("passthrough:///", opts...)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}

// WithConn uses a connection of the application's instead of dialling one. Dial's address must be empty, so [DialEnv]
// cannot use it. Close leaves the connection open. gRPC refuses an API key if the connection is not secure, unless
// [WithInsecureAPIKey] is given too. The client does not see answers that come too late, so an agent whose answers are
// all too late counts as dead; see [AgentBreaker].
func WithConn(conn grpc.ClientConnInterface) Option {
	return option{"WithConn", true, func(c *config) error {
		if conn == nil {
			return errors.New("no connection")
		}
		c.conn = conn
		return nil
	}}
}

// WithoutTelemetry sends no flow records to the agent. The agent's policies on latency and load then see nothing of
// this client. Circuit breakers of an agent of Headgate learn how flows end by the client's session.
func WithoutTelemetry() Option {
	return option{"WithoutTelemetry", true, func(c *config) error {
		c.noTelemetry = true
		return nil
	}}
}

// WithAgentBreaker sets when an agent counts as dead, see [AgentBreaker].
func WithAgentBreaker(g AgentBreaker) Option {
	return option{"WithAgentBreaker", true, func(c *config) error {
		if g.Span < 0 || g.Probe < 0 {
			return errors.New("a time is negative")
		}
		c.breaker = g
		return nil
	}}
}

// WithCheckTimeout sets how long the agent may take to answer if Params do not say. The default is 200 ms. A d of 0 means the
// default. A negative d sets no limit. The check timeout is also the longest that a flow waits in a queue. Across the network it
// should be well above 10 ms: with less time left, an agent rejects a flow that a limiter or scheduler acts on.
func WithCheckTimeout(d time.Duration) Option {
	return option{"WithCheckTimeout", false, func(c *config) error {
		if d == 0 {
			d = defaultCheckTimeout
		}
		c.checkTimeout = d
		return nil
	}}
}

// WithEndTimeout sets how long a call to the agent may take that ends a flow with slots, or that changes a cache entry.
// The default is 1 s.
func WithEndTimeout(d time.Duration) Option {
	return option{"WithEndTimeout", true, func(c *config) error {
		if d <= 0 {
			return errors.New("not positive")
		}
		c.endTimeout = d
		return nil
	}}
}

// WithLabels gives every flow of the client these labels. All other sources override them, see package labels. The map
// is copied; repeated use adds to it.
func WithLabels(m map[string]string) Option {
	m = maps.Clone(m)
	return option{"WithLabels", false, func(c *config) error {
		if err := labels.Check(m); err != nil {
			return err
		}
		if c.shared.Defaults == nil {
			c.shared.Defaults = make(map[string]string, len(m))
		}
		maps.Copy(c.shared.Defaults, m)
		if n := len(c.shared.Defaults); n > labels.MaxLabels {
			return tooManyLabels(n)
		}
		return nil
	}}
}

// WithBaggage makes labels of members of the context's OpenTelemetry baggage: of those with the given keys. If no key
// is given, it takes all members except those that begin with "http." or "rpc.". Name the keys if peers send baggage: a
// named member is found behind any number of others, and the others cost nothing. Without names, members of more than 1
// MiB make a flow Invalid, and CheckHTTP may leave some out, see [HTTPRequest]. A flow with Params.HTTP also gets
// members of the request's baggage header that the context does not have. Without this option no member becomes a
// label.
func WithBaggage(keys ...string) Option {
	keys = slices.Clone(keys)
	return option{"WithBaggage", false, func(c *config) error {
		c.baggage, c.baggageKeys = true, keys
		return nil
	}}
}

// WithService names the service that the client's flows belong to, for the selectors of an embedded engine's policies.
// Remote agents do not get the name: an Aperture agent finds the service by the client's address, and for package agent
// no flow has a service.
func WithService(name string) Option {
	return option{"WithService", false, func(c *config) error {
		c.shared.Service = name
		return nil
	}}
}

// WithDryRun asks the agent about every flow and counts the decisions, but runs every flow. It shows what policies
// would do before they are in force. The flow's Decision, Err and RetryAfter are what they would have been, for logs
// and metrics. ShouldRun and HTTPStatus are those of a flow that runs.
//
// An engine, in this process or behind package agent, decides as if each of its components were in dry run (see the
// DryRun of package policy's components): no flow waits in a queue, and one that would have to wait counts as rejected. A
// flow that some components would have dropped keeps what the others gave it until it ends. Caches are looked up for
// every flow, and store what they are given. An engine counts what its components would have dropped in
// flowcontrol_dry_run_drops_total.
//
// Start waits for the answer, which has the decision and the cached values. Over the network it waits for the check
// timeout at the most, or for 200 ms if Params and [WithCheckTimeout] set no limit. Agents other than Headgate's do not
// know dry runs, and hold flows in their queues for that long. Set a short check timeout for them. If such an agent
// rejects a flow, a second call asks for the cached values.
func WithDryRun() Option {
	return option{"WithDryRun", false, func(c *config) error {
		c.dryRun = true
		return nil
	}}
}

// WithCancelOnLostSlot cancels the context of a flow when its slots are lost. Slots at an agent of Headgate are lost when it has
// acknowledged no heartbeat for 9 s, because it may soon give them to other flows. Slots that such an agent has taken from a store are
// also lost when it was cut off from the store for so long that the store may soon give them to others. Slots that an engine in this
// process has taken from a store are lost when the engine's lease was not renewed for two thirds of its time, because the engine was cut
// off from the store, or was paused. The store gives none of them to others before that. [context.Cause] of the flow's context is
// [ErrSlotLost] then. Use this option for work that must never run more often than the limit allows.
// Without it, such flows continue, because an agent's outage should not become the application's. The context is [Flow.Context],
// or what package headgate's guards pass on. With this option it also ends when a flow with slots ends. It has no effect on slots
// at other agents, nor on slots from before the session began, because these do not run out with the session. Slots that an
// engine in this process has in its memory are never lost. Neither are slots of a dry run, the client's or a component's.
func WithCancelOnLostSlot() Option {
	return option{"WithCancelOnLostSlot", false, func(c *config) error {
		c.cancelLost = true
		return nil
	}}
}

// WithLogger makes the client log what its operator should know, each kind once a minute at most. By default, and with
// nil, it logs nothing.
func WithLogger(logger *slog.Logger) Option {
	return option{"WithLogger", false, func(c *config) error {
		if logger == nil {
			logger = slog.New(slog.DiscardHandler)
		}
		c.logger = logger
		return nil
	}}
}

// WithOnDecision makes Start call f with each flow after the decision and before Start returns. Start calls it for accepted flows
// and for all others, in a dry run too, and with any kind of agent. It is for programs that record decisions by what metrics must
// not hold, such as a customer's ID. Ctx is that of Start's caller, with the flow's span. A call of f delays its flow. Many
// goroutines call f at once. It must not end the flow. If f panics, Start ends the flow, and the panic continues. Without this
// option, and with a nil f, Start makes no such call.
func WithOnDecision(f func(ctx context.Context, flow *Flow)) Option {
	return option{"WithOnDecision", false, func(c *config) error {
		c.onDecision = f
		return nil
	}}
}

// WithTracerProvider records a span of the application's own trace for each flow. By default, and with nil, none is.
// The flow records that a remote agent gets do not depend on it.
func WithTracerProvider(p trace.TracerProvider) Option {
	return option{"WithTracerProvider", false, func(c *config) error {
		c.tracer = p
		return nil
	}}
}

// WithMeterProvider counts the client's decisions in flowcontrol_decisions_total, by control point, decision and reason, and the
// pauses of package httpguard's Transports. It also shows what the client knows of its agent. For an engine these are all of the
// engine's metrics. For a remote agent they are the state of the agent breaker, in flowcontrol_gate_open, and the drops that
// components in dry run would have made. By default, and with nil, nothing is shown. No label of a flow becomes an attribute.
func WithMeterProvider(p metric.MeterProvider) Option {
	return option{"WithMeterProvider", false, func(c *config) error {
		c.meter = p
		return nil
	}}
}
