package mlxpool

import (
	"context"
	"io"
	"iter"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	mlxpoolv1 "mlxpool/gen/go/mlxpool/v1"
)

// The events of a generation: one Started, any Progress and Delta, then exactly one Finished.
type (
	Started  = mlxpoolv1.GenerationStarted
	Progress = mlxpoolv1.GenerationProgress
	Delta    = mlxpoolv1.GenerationDelta
	Finished = mlxpoolv1.GenerationFinished
)

// The events of a load: any LoadProgress, then exactly one LoadFinished.
type (
	LoadProgress = mlxpoolv1.LoadProgress
	LoadFinished = mlxpoolv1.LoadFinished
)

// Event is a *Started, *Progress, *Delta or *Finished.
type Event interface{ proto.Message }

// LoadEvent is a *LoadProgress or *LoadFinished.
type LoadEvent interface{ proto.Message }

// Generate starts a generation when the loop over it begins, and cancels it when the loop is left;
// so does the end of ctx, whose deadline is the call's. An error comes last, with a nil event.
// Each loop is a call of its own.
func (c *Client) Generate(
	ctx context.Context, request *GenerateRequest, opts ...grpc.CallOption,
) iter.Seq2[Event, error] {
	return events(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[mlxpoolv1.GenerateResponse], error) {
		return c.Models.Generate(ctx, request, opts...)
	}, generationEvent)
}

// Result runs a generation to its end, and returns its last event, which has the whole text.
func (c *Client) Result(
	ctx context.Context, request *GenerateRequest, opts ...grpc.CallOption,
) (*Finished, error) {
	var finished *Finished
	for event, err := range c.Generate(ctx, request, opts...) {
		if err != nil {
			return nil, err
		}
		if last, ok := event.(*Finished); ok {
			finished = last
		}
	}
	return finished, nil
}

// Load loads a model, or watches a load that runs already. Leaving the loop stops watching, not
// loading: only UnloadModel stops a load.
func (c *Client) Load(
	ctx context.Context, request *LoadModelRequest, opts ...grpc.CallOption,
) iter.Seq2[LoadEvent, error] {
	return events(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[mlxpoolv1.LoadModelResponse], error) {
		return c.Models.LoadModel(ctx, request, opts...)
	}, loadEvent)
}

// events reads a call to its end. kind returns a nil event for what a newer server says, and
// whether the event is the last one.
func events[Response any, E comparable](
	ctx context.Context,
	start func(context.Context) (grpc.ServerStreamingClient[Response], error),
	kind func(*Response) (event E, isLast bool),
) iter.Seq2[E, error] {
	return func(yield func(E, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var none E
		hasEnded := false
		stream, err := start(ctx)
		for err == nil {
			var response *Response
			if response, err = stream.Recv(); err == nil && ctx.Err() != nil {
				// It was on its way when the caller gave up.
				err = typed(status.FromContextError(ctx.Err()).Err())
			}
			if err != nil {
				break
			}
			event, isLast := kind(response)
			hasEnded = hasEnded || isLast
			if event != none && !yield(event, nil) {
				return
			}
		}
		if err != io.EOF {
			yield(none, err)
		} else if !hasEnded {
			yield(none, ErrIncomplete)
		}
	}
}

func generationEvent(response *mlxpoolv1.GenerateResponse) (Event, bool) {
	switch event := response.GetEvent().(type) {
	case *mlxpoolv1.GenerateResponse_Started:
		return event.Started, false
	case *mlxpoolv1.GenerateResponse_Progress:
		return event.Progress, false
	case *mlxpoolv1.GenerateResponse_Delta:
		return event.Delta, false
	case *mlxpoolv1.GenerateResponse_Finished:
		return event.Finished, true
	}
	return nil, false
}

func loadEvent(response *mlxpoolv1.LoadModelResponse) (LoadEvent, bool) {
	switch event := response.GetEvent().(type) {
	case *mlxpoolv1.LoadModelResponse_Progress:
		return event.Progress, false
	case *mlxpoolv1.LoadModelResponse_Finished:
		return event.Finished, true
	}
	return nil, false
}
