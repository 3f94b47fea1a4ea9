package mlxpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const errorDomain = "mlxpool"

// Reason is the contract's stable name for a failure. It is an error, so that
// errors.Is(err, mlxpool.ReasonModelNotFound) asks for it.
type Reason string

func (r Reason) Error() string { return string(r) }

// The reasons of this version of the contract; a newer server may have others.
const (
	ReasonInvalidField       Reason = "INVALID_FIELD"
	ReasonPromptTooLong      Reason = "PROMPT_TOO_LONG"
	ReasonBadConstraint      Reason = "BAD_CONSTRAINT"
	ReasonModelNotFound      Reason = "MODEL_NOT_FOUND"
	ReasonAdapterNotFound    Reason = "ADAPTER_NOT_FOUND"
	ReasonGenerationNotFound Reason = "GENERATION_NOT_FOUND"
	ReasonGenerationIDInUse  Reason = "GENERATION_ID_IN_USE"
	ReasonModelNotLoaded     Reason = "MODEL_NOT_LOADED"
	ReasonCapabilityMissing  Reason = "CAPABILITY_MISSING"
	ReasonModelInUse         Reason = "MODEL_IN_USE"
	ReasonMemoryInUse        Reason = "MEMORY_IN_USE"
	ReasonAPIKeyMissing      Reason = "API_KEY_MISSING"
	ReasonAPIKeyInvalid      Reason = "API_KEY_INVALID"
	ReasonRoleMissing        Reason = "ROLE_MISSING"
	ReasonPoolMemoryLimit    Reason = "POOL_MEMORY_LIMIT"
	ReasonRateLimited        Reason = "RATE_LIMITED"
	ReasonTooManyStreams     Reason = "TOO_MANY_STREAMS"
	ReasonLoadSuperseded     Reason = "LOAD_SUPERSEDED"
	ReasonModelUnloaded      Reason = "MODEL_UNLOADED"
	ReasonQueueFull          Reason = "QUEUE_FULL"
	ReasonDraining           Reason = "DRAINING"
	ReasonDeadlineUnmeetable Reason = "DEADLINE_UNMEETABLE"
	ReasonQueueTimeout       Reason = "QUEUE_TIMEOUT"
	ReasonNotImplemented     Reason = "NOT_IMPLEMENTED"
	ReasonLoadFailed         Reason = "LOAD_FAILED"
	ReasonGenerationFailed   Reason = "GENERATION_FAILED"
	ReasonInternal           Reason = "INTERNAL"
)

// ErrIncomplete ends a stream that the server closed with status OK and without its last event:
// treat the output as cut off.
var ErrIncomplete = fmt.Errorf("mlxpool: the stream ended without its finished event: %w", io.ErrUnexpectedEOF)

// FieldViolation is what is wrong with one field of a request, by its path in the contract's names.
type FieldViolation struct {
	Field       string
	Description string
}

// Error is a failed call: what the server said, empty where it said nothing.
//
// errors.As finds it; errors.Is compares it with a Reason, and with context.DeadlineExceeded and
// context.Canceled by its code. status.FromError gives the gRPC status.
type Error struct {
	Code codes.Code
	// Empty for failures of gRPC itself or of something in between.
	Reason  Reason
	Message string
	// The facts behind the reason; requiredBytes and the like are decimal texts.
	Metadata        map[string]string
	FieldViolations []FieldViolation
	// When the server suggests to come back; 0 = not said.
	RetryAfter time.Duration

	status *status.Status
}

func (e *Error) Error() string {
	if e.Reason != "" {
		return fmt.Sprintf("mlxpool: %s: %s", e.Reason, e.Message)
	}
	return fmt.Sprintf("mlxpool: %s: %s", e.Code, e.Message)
}

// Is makes errors.Is compare by reason, and the context's errors by code.
func (e *Error) Is(target error) bool {
	switch target {
	case context.DeadlineExceeded:
		return e.Code == codes.DeadlineExceeded
	case context.Canceled:
		return e.Code == codes.Canceled
	}
	reason, ok := target.(Reason)
	return ok && e.Reason == reason
}

// GRPCStatus is the status as it came.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// typed returns a gRPC failure as *Error; nil, io.EOF and what is typed already stay as they are.
func typed(err error) error {
	var known *Error
	if err == nil || err == io.EOF || errors.As(err, &known) {
		return err
	}
	s := status.Convert(err)
	e := &Error{Code: s.Code(), Message: s.Message(), status: s}
	for _, detail := range s.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == errorDomain {
				e.Reason = Reason(detail.GetReason())
				e.Metadata = detail.GetMetadata()
			}
		case *errdetails.BadRequest:
			for _, violation := range detail.GetFieldViolations() {
				e.FieldViolations = append(e.FieldViolations,
					FieldViolation{violation.GetField(), violation.GetDescription()})
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = detail.GetRetryDelay().AsDuration()
		}
	}
	return e
}

func typedUnaryErrors(
	ctx context.Context, method string, request, reply any, conn *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	return typed(invoker(ctx, method, request, reply, conn, opts...))
}

func typedStreamErrors(
	ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string,
	streamer grpc.Streamer, opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, conn, method, opts...)
	if err != nil {
		return nil, typed(err)
	}
	return &typedStream{stream}, nil
}

type typedStream struct{ grpc.ClientStream }

func (s *typedStream) SendMsg(message any) error { return typed(s.ClientStream.SendMsg(message)) }
func (s *typedStream) RecvMsg(message any) error { return typed(s.ClientStream.RecvMsg(message)) }
