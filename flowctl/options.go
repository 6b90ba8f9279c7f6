package flowctl

import (
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

// An Option configures a client. Of several of a kind the last one counts, unless its comment says otherwise. Options
// for the connection to an agent are errors for a client of an embedded one.
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
	plaintextEnv string // the variable that has the key travel in plaintext, where one does
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

// WithTLSConfig sets up TLS. The default is TLS with the system's roots. The configuration is copied.
func WithTLSConfig(t *tls.Config) Option {
	return option{"WithTLSConfig", true, func(c *config) error {
		if t == nil {
			return errors.New("no configuration")
		}
		c.tls = t.Clone()
		return nil
	}}
}

// WithTransportCredentials secures the connection in a way of its own, instead of TLS by [WithTLSConfig].
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
// It replaces an x-api-key in the outgoing metadata of the caller's context; the rest of these metadata is sent besides. In
// plaintext the key only travels to this machine, unless [WithInsecureAPIKey] says otherwise.
func WithAPIKey(key string) Option {
	return option{"WithAPIKey", true, func(c *config) error {
		if err := checkAPIKey(key); err != nil {
			return err
		}
		c.apiKey = key
		return nil
	}}
}

// WithInsecureAPIKey lets the API key travel in plaintext to other machines. Whoever sees the traffic has the key.
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

// WithDialOptions adds options of gRPC's own for the connection. They come after those of this package, and repeated
// use adds more. Transport credentials among them are an error, for they would keep the [AgentBreaker] from seeing late answers,
// and an API key from knowing how it travels: they have options here, [WithTransportCredentials] and others. An agent's
// compressed answer is refused unless the question was compressed, for example by grpc.UseCompressor among the default
// call options.
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

// setCredentials reports whether the options bring transport credentials. They cannot be looked into, but gRPC makes no
// client, connected or not, without any.
func setCredentials(opts []grpc.DialOption) bool {
	conn, err := grpc.NewClient("passthrough:///", opts...)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}

// WithConn talks over a connection that the application has, instead of dialling one: Dial's address must be empty, and
// [DialEnv] has no use for it. Close leaves the connection open. An API key is refused by gRPC if the connection is not
// secure, unless [WithInsecureAPIKey] is given too. What comes over the connection for other calls than a flow's own is
// not seen, so an agent whose answers all come too late counts as dead here; see [AgentBreaker].
func WithConn(conn grpc.ClientConnInterface) Option {
	return option{"WithConn", true, func(c *config) error {
		if conn == nil {
			return errors.New("no connection")
		}
		c.conn = conn
		return nil
	}}
}

// WithoutTelemetry sends no flow records to the agent. Its policies that react to latency then see nothing of this
// client.
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

// WithCheckTimeout sets how long the agent may take to answer when Params do not say: 200 ms by default and for a d of
// 0, and no limit for a negative one. It is also the longest that a flow waits in a queue. An agent across the network
// rejects a check that reaches it with less than 10 ms left, as rate limited, wherever a limiter has a say: allow it
// more than that.
func WithCheckTimeout(d time.Duration) Option {
	return option{"WithCheckTimeout", false, func(c *config) error {
		if d == 0 {
			d = defaultCheckTimeout
		}
		c.checkTimeout = d
		return nil
	}}
}

// WithEndTimeout sets how long the call to the agent may take that ends a flow which holds slots, or that changes a
// cache entry: 1 s by default.
func WithEndTimeout(d time.Duration) Option {
	return option{"WithEndTimeout", true, func(c *config) error {
		if d <= 0 {
			return errors.New("not positive")
		}
		c.endTimeout = d
		return nil
	}}
}

// WithLabels gives every flow of the client these labels, unless another source says otherwise; see package labels for
// the order. The map is copied; repeated use adds to it.
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

// WithBaggage makes members of the context's OpenTelemetry baggage labels: those with the given keys, or all when none
// is given. Name them where peers send baggage: members that are named are found behind any number of others, and others
// cost nothing. For a flow with Params.HTTP, those of the request's baggage header are too that the context does not have.
// Without this option none is.
func WithBaggage(keys ...string) Option {
	keys = slices.Clone(keys)
	return option{"WithBaggage", false, func(c *config) error {
		c.baggage, c.baggageKeys = true, keys
		return nil
	}}
}

// WithService names the service that the client's flows belong to, for the selectors of an embedded engine's policies. It
// does not travel: an Aperture agent finds the service by the client's address, and to package agent no flow has one.
func WithService(name string) Option {
	return option{"WithService", false, func(c *config) error {
		c.shared.Service = name
		return nil
	}}
}

// WithDryRun asks the agent about every flow and counts its decisions, but runs them all: to see what policies would
// do before they do it. The flow's Decision, Err and RetryAfter are what they would have been, for logs and metrics;
// ShouldRun and HTTPStatus are those of a flow that runs.
//
// An engine, in this process or behind package agent, decides as if each of its components were in dry run (see the
// DryRun of package policy's components): no flow waits in a queue, and one that would have to wait counts as rejected. A
// flow that some components would have dropped keeps what the others gave it until it ends. Caches are looked up for
// every flow, and store what they are given. An engine counts what its components would have dropped in
// flowcontrol_dry_run_drops_total.
//
// Start waits for the answer, because it brings the decision and what the caches have. Over the network that is for the
// check timeout at the most; where Params and [WithCheckTimeout] set no limit it is 200 ms in a dry run. Other agents
// than Headgate's do not know of dry runs, and hold flows in their queues for as long: set a short check timeout for
// these. What they have in their caches for a flow that they reject is asked for by a second call.
func WithDryRun() Option {
	return option{"WithDryRun", false, func(c *config) error {
		c.dryRun = true
		return nil
	}}
}

// WithLogger has the client log what its operator should know, each kind once a minute at most. By default, and with
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

// WithTracerProvider records a span of the application's own trace for each flow. By default, and with nil, none is.
// The flow records that a remote agent gets do not depend on it.
func WithTracerProvider(p trace.TracerProvider) Option {
	return option{"WithTracerProvider", false, func(c *config) error {
		c.tracer = p
		return nil
	}}
}

// WithMeterProvider counts the client's decisions in flowcontrol_decisions_total, by control point, decision and
// reason, and the pauses of package httpguard's Transports. It shows what the agent knows of itself. Of a remote agent, that
// is whether its agent breaker is open, in flowcontrol_gate_open, and what components in dry run would have dropped. Of an engine, it
// is all that the engine counts. By default, and with nil, nothing is shown. No label of a flow becomes an attribute.
func WithMeterProvider(p metric.MeterProvider) Option {
	return option{"WithMeterProvider", false, func(c *config) error {
		c.meter = p
		return nil
	}}
}
