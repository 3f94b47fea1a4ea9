package mlxpool_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"mlxpool"
	mlxpoolv1 "mlxpool/gen/go/mlxpool/v1"
)

const patience = 20 * time.Second

// fake is a server whose Generate the test writes.
type fake struct {
	mlxpoolv1.UnimplementedModelServiceServer
	generate func(grpc.ServerStreamingServer[mlxpoolv1.GenerateResponse]) error
	getModel func(context.Context) error
}

func (f *fake) Generate(_ *mlxpoolv1.GenerateRequest, stream grpc.ServerStreamingServer[mlxpoolv1.GenerateResponse]) error {
	return f.generate(stream)
}

func (f *fake) GetModel(ctx context.Context, _ *mlxpoolv1.GetModelRequest) (*mlxpoolv1.GetModelResponse, error) {
	return &mlxpoolv1.GetModelResponse{}, f.getModel(ctx)
}

func serve(t *testing.T, service *fake, with ...mlxpool.Option) *mlxpool.Client {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	mlxpoolv1.RegisterModelServiceServer(server, service)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	client, err := mlxpool.New(listener.Addr().String(), with...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func started() *mlxpoolv1.GenerateResponse {
	return &mlxpoolv1.GenerateResponse{
		Event: &mlxpoolv1.GenerateResponse_Started{Started: &mlxpool.Started{}},
	}
}

func finished(text string) *mlxpoolv1.GenerateResponse {
	last := &mlxpool.Finished{Message: mlxpool.Assistant(text)}
	return &mlxpoolv1.GenerateResponse{Event: &mlxpoolv1.GenerateResponse_Finished{Finished: last}}
}

func patient(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// Leaving the loop cancels the call: the server's context ends.
func TestLeavingTheLoopCancels(t *testing.T) {
	left := make(chan struct{})
	client := serve(t, &fake{generate: func(stream grpc.ServerStreamingServer[mlxpoolv1.GenerateResponse]) error {
		defer close(left)
		if err := stream.Send(started()); err != nil {
			return err
		}
		<-stream.Context().Done()
		return nil
	}})
	for event, err := range client.Generate(patient(t), mlxpool.TextRequest("m", "p")) {
		if _, ok := event.(*mlxpool.Started); !ok {
			t.Fatal(event, err)
		}
		break
	}
	select {
	case <-left:
	case <-time.After(patience):
		t.Fatal("the server was not told")
	}
}

// Result is the last event.
func TestResult(t *testing.T) {
	client := serve(t, &fake{generate: func(stream grpc.ServerStreamingServer[mlxpoolv1.GenerateResponse]) error {
		return errors.Join(stream.Send(started()), stream.Send(finished("yes")))
	}})
	last, err := client.Result(patient(t), mlxpool.TextRequest("m", "p"))
	if err != nil || mlxpool.Text(last.GetMessage()) != "yes" {
		t.Fatal(last, err)
	}
}

// A stream with status OK and no last event is ErrIncomplete, an unexpected end of file.
func TestIncompleteStream(t *testing.T) {
	client := serve(t, &fake{generate: func(stream grpc.ServerStreamingServer[mlxpoolv1.GenerateResponse]) error {
		return stream.Send(started())
	}})
	_, err := client.Result(patient(t), mlxpool.TextRequest("m", "p"))
	if !errors.Is(err, mlxpool.ErrIncomplete) || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
}

// The facts of google.rpc's details are fields of *Error, of streams and of plain calls.
func TestErrorsAreTyped(t *testing.T) {
	refusal, err := status.New(codes.Unavailable, "full").WithDetails(
		&errdetails.ErrorInfo{Domain: "mlxpool", Reason: "QUEUE_FULL", Metadata: map[string]string{"a": "b"}},
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "f", Description: "d"}}},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(1500 * time.Millisecond)},
	)
	if err != nil {
		t.Fatal(err)
	}
	client := serve(t, &fake{
		generate: func(stream grpc.ServerStreamingServer[mlxpoolv1.GenerateResponse]) error {
			stream.SetTrailer(metadata.Pairs("grpc-retry-pushback-ms", "-1"))
			return refusal.Err()
		},
		getModel: func(ctx context.Context) error {
			grpc.SetTrailer(ctx, metadata.Pairs("grpc-retry-pushback-ms", "-1"))
			return refusal.Err()
		},
	})
	_, streamErr := client.Result(patient(t), mlxpool.TextRequest("m", "p"))
	_, callErr := client.Models.GetModel(patient(t), &mlxpoolv1.GetModelRequest{})
	for _, err := range []error{streamErr, callErr} {
		var failure *mlxpool.Error
		if !errors.As(err, &failure) {
			t.Fatalf("%T", err)
		}
		violation := mlxpool.FieldViolation{Field: "f", Description: "d"}
		if failure.Code != codes.Unavailable || failure.Metadata["a"] != "b" ||
			failure.FieldViolations[0] != violation || failure.RetryAfter != 1500*time.Millisecond {
			t.Errorf("%+v", failure)
		}
		if !errors.Is(err, mlxpool.ReasonQueueFull) || errors.Is(err, mlxpool.ReasonDraining) {
			t.Error("not compared by reason")
		}
		if status.Code(err) != codes.Unavailable {
			t.Error("no gRPC status")
		}
	}
}

// A deadline and a cancelled context are the context's own errors as well.
func TestContextErrors(t *testing.T) {
	client := serve(t, &fake{generate: func(stream grpc.ServerStreamingServer[mlxpoolv1.GenerateResponse]) error {
		if err := stream.Send(started()); err != nil {
			return err
		}
		<-stream.Context().Done()
		return nil
	}})
	late, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := client.Result(late, mlxpool.TextRequest("m", "p")); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	ctx, stop := context.WithCancel(patient(t))
	defer stop()
	for event, err := range client.Generate(ctx, mlxpool.TextRequest("m", "p")) {
		stop()
		if event == nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}

// The key is sent as a bearer token; nothing is sent without one.
func TestAPIKey(t *testing.T) {
	var got []string
	service := &fake{getModel: func(ctx context.Context) error {
		got = metadata.ValueFromIncomingContext(ctx, "authorization")
		return nil
	}}
	for key, want := range map[string]string{"": "", "secret": "Bearer secret"} {
		client := serve(t, service, mlxpool.WithAPIKey(key))
		if _, err := client.Models.GetModel(patient(t), &mlxpoolv1.GetModelRequest{}); err != nil {
			t.Fatal(err)
		}
		if strings.Join(got, "") != want {
			t.Errorf("got %q for %q", got, key)
		}
	}
}

// A key stays on this machine, or is encrypted, unless the caller says otherwise.
func TestAPIKeyInPlaintext(t *testing.T) {
	key := mlxpool.WithAPIKey("secret")
	for target, with := range map[string][]mlxpool.Option{
		"127.0.0.1:1":     {key},
		"localhost:1":     {key},
		"[::1]:1":         {key},
		"unix:/run/m":     {key},
		"dns:///[::1]:1":  {key},
		"model.example:1": {key, mlxpool.WithTLS(nil)},
		"10.0.0.1:1":      {key, mlxpool.WithPlaintextKey()},
		"other.example:1": {},
	} {
		client, err := mlxpool.New(target, with...)
		if err != nil {
			t.Error(target, err)
			continue
		}
		client.Close()
	}
	for _, target := range []string{"model.example:1", "10.0.0.1:1", "127.example:1", "dns:///host:1"} {
		if _, err := mlxpool.New(target, key); err == nil {
			t.Error(target, "got the key")
		}
	}
	for _, wrong := range []string{"secret\n", "two words", "schlüssel"} {
		if _, err := mlxpool.New("127.0.0.1:1", mlxpool.WithAPIKey(wrong)); err == nil {
			t.Errorf("%q is no key", wrong)
		}
	}
}

// WaitReady returns when the connection stands, and with the context's error when it does not.
func TestWaitReady(t *testing.T) {
	if err := serve(t, &fake{}).WaitReady(patient(t)); err != nil {
		t.Error(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := listener.Addr().String()
	listener.Close()
	client, err := mlxpool.New(target)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if err := client.WaitReady(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := client.WaitReady(context.Background()); err == nil {
		t.Error("a wait without an end")
	}
}

// Files that are missing, or hold no certificate, are errors.
func TestTLSFiles(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, files := range [][3]string{{"missing.crt"}, {empty}, {"", empty, ""}, {"", "", empty}} {
		if _, err := mlxpool.TLSFiles(files[0], files[1], files[2]); err == nil {
			t.Error(files)
		}
	}
	if config, err := mlxpool.TLSFiles("", "", ""); err != nil || config.RootCAs != nil {
		t.Error(config, err)
	}
}

// Messages carry their role and text.
func TestMessages(t *testing.T) {
	roles := map[*mlxpool.ChatMessage]mlxpoolv1.Role{
		mlxpool.System("a"):          mlxpoolv1.Role_ROLE_SYSTEM,
		mlxpool.User("a"):            mlxpoolv1.Role_ROLE_USER,
		mlxpool.Assistant("a"):       mlxpoolv1.Role_ROLE_ASSISTANT,
		mlxpool.ToolResult("c", "a"): mlxpoolv1.Role_ROLE_TOOL,
	}
	for message, role := range roles {
		if message.GetRole() != role || mlxpool.Text(message) != "a" {
			t.Error(message)
		}
	}
}
