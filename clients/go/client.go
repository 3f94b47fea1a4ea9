package mlxpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	mlxpoolv1 "mlxpool/gen/go/mlxpool/v1"
)

// DefaultTarget is where a server listens that was told nothing else.
const DefaultTarget = "127.0.0.1:50051"

const maxReceiveBytes = 64 << 20

// gRPC retries only what has not produced a message yet, so an answer never starts twice. With
// nothing listening the four attempts are over in about a second.
const serviceConfig = `{"methodConfig": [{
	"name": [{"service": "mlxpool.v1.ModelService"}, {"service": "mlxpool.v1.MemoryService"}],
	"retryPolicy": {
		"maxAttempts": 4,
		"initialBackoff": "0.1s",
		"maxBackoff": "2s",
		"backoffMultiplier": 2,
		"retryableStatusCodes": ["UNAVAILABLE"]
	}
}]}`

// Client is a connection to one server; safe for use by many goroutines. Close it.
//
// Models and Memory are the contract's calls as they are generated; their errors are *Error, and
// UNAVAILABLE is retried up to three times as long as no message has arrived.
type Client struct {
	Models mlxpoolv1.ModelServiceClient
	Memory mlxpoolv1.MemoryServiceClient

	target string
	conn   *grpc.ClientConn
}

type options struct {
	tls             *tls.Config
	apiKey          string
	allowsPlainKey  bool
	callOptions     []grpc.CallOption
	moreDialOptions []grpc.DialOption
}

// Option changes how New connects.
type Option func(*options)

// WithTLS encrypts the connection; nil trusts the system's authorities. TLSFiles reads PEM files.
func WithTLS(config *tls.Config) Option {
	return func(o *options) {
		if config == nil {
			config = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		o.tls = config
	}
}

// WithAPIKey sends the key with every call. Without TLS it goes to this machine only, unless
// WithPlaintextKey says that the network is trusted.
func WithAPIKey(key string) Option {
	return func(o *options) { o.apiKey = key }
}

// WithPlaintextKey lets an API key travel to another machine unencrypted.
func WithPlaintextKey() Option {
	return func(o *options) { o.allowsPlainKey = true }
}

// WithWaitForReady makes calls wait for the server to come up, up to their context's deadline,
// instead of failing after about a second.
func WithWaitForReady() Option {
	return func(o *options) { o.callOptions = append(o.callOptions, grpc.WaitForReady(true)) }
}

// WithDialOptions adds gRPC's own options, behind those of this package.
func WithDialOptions(more ...grpc.DialOption) Option {
	return func(o *options) { o.moreDialOptions = append(o.moreDialOptions, more...) }
}

// New returns a client for target, "host:port" or "unix:path"; it connects with the first call.
// An API key that no server can have, or that would leave this machine in plaintext, is an error.
func New(target string, with ...Option) (*Client, error) {
	var o options
	for _, apply := range with {
		apply(&o)
	}
	transport := insecure.NewCredentials()
	if o.tls != nil {
		transport = credentials.NewTLS(o.tls)
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDisableServiceConfig(),
		grpc.WithUnaryInterceptor(typedUnaryErrors),
		grpc.WithStreamInterceptor(typedStreamErrors),
		// The server answers pings more frequent than every 10 s with GOAWAY.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 30 * time.Second, Timeout: 10 * time.Second,
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second,
			},
			MinConnectTimeout: 20 * time.Second,
		}),
		grpc.WithDefaultCallOptions(
			append(o.callOptions, grpc.MaxCallRecvMsgSize(maxReceiveBytes))...,
		),
	}
	if o.apiKey != "" {
		if err := checkKey(target, &o); err != nil {
			return nil, err
		}
		dial = append(dial, grpc.WithPerRPCCredentials(bearer(o.apiKey)))
	}
	conn, err := grpc.NewClient(target, append(dial, o.moreDialOptions...)...)
	if err != nil {
		return nil, fmt.Errorf("mlxpool: %w", err)
	}
	return &Client{
		Models: mlxpoolv1.NewModelServiceClient(conn),
		Memory: mlxpoolv1.NewMemoryServiceClient(conn),
		target: target,
		conn:   conn,
	}, nil
}

// Close closes the connection; calls in flight end with CANCELLED.
func (c *Client) Close() error {
	return c.conn.Close()
}

// Conn is the connection itself, for grpc.health.v1 and other services of the server.
func (c *Client) Conn() *grpc.ClientConn {
	return c.conn
}

// WaitReady waits until the connection stands. Its error is the context's.
func (c *Client) WaitReady(ctx context.Context) error {
	if _, bounded := ctx.Deadline(); !bounded && ctx.Done() == nil {
		return errors.New("mlxpool: WaitReady needs a context that ends")
	}
	for state := c.conn.GetState(); state != connectivity.Ready; state = c.conn.GetState() {
		c.conn.Connect()
		if !c.conn.WaitForStateChange(ctx, state) {
			return fmt.Errorf("mlxpool: nothing answered at %s: %w", c.target, context.Cause(ctx))
		}
	}
	return nil
}
