// The Go client behind the conformance suite's protocol: tests/conformance/README.md.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log"
	"os"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"mlxpool"
	mlxpoolv1 "mlxpool/gen/go/mlxpool/v1"
)

type call struct {
	Target            string          `json:"target"`
	Method            string          `json:"method"`
	Request           json.RawMessage `json:"request"`
	TimeoutS          float64         `json:"timeout_s"`
	TLSCA             string          `json:"tls_ca"`
	APIKey            string          `json:"api_key"`
	WaitForReady      bool            `json:"wait_for_ready"`
	CancelAfterEvents int             `json:"cancel_after_events"`
}

type violation struct {
	Field       string `json:"field"`
	Description string `json:"description"`
}

type end struct {
	Code       string            `json:"code"`
	Reason     mlxpool.Reason    `json:"reason"`
	Message    string            `json:"message"`
	Metadata   map[string]string `json:"metadata"`
	Violations []violation       `json:"field_violations"`
	RetryAfter *float64          `json:"retry_after_s"`
}

var out = bufio.NewWriter(os.Stdout)

func main() {
	for calls := json.NewDecoder(bufio.NewReader(os.Stdin)); ; {
		var c call
		if err := calls.Decode(&c); err == io.EOF {
			return
		} else if err != nil {
			log.Fatal(err)
		}
		write(map[string]any{"end": ending(perform(&c))})
	}
}

func write(line any) {
	encoded, err := json.Marshal(line)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Fprintf(out, "%s\n", encoded)
	if err := out.Flush(); err != nil {
		log.Fatal(err)
	}
}

func perform(c *call) error {
	var with []mlxpool.Option
	if c.TLSCA != "" {
		config, err := mlxpool.TLSFiles(c.TLSCA, "", "")
		if err != nil {
			log.Fatal(err)
		}
		with = append(with, mlxpool.WithTLS(config))
	}
	if c.APIKey != "" {
		with = append(with, mlxpool.WithAPIKey(c.APIKey))
	}
	if c.WaitForReady {
		with = append(with, mlxpool.WithWaitForReady())
	}
	client, err := mlxpool.New(c.Target, with...)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(c.TimeoutS*float64(time.Second)))
	defer cancel()

	switch c.Method {
	case "Generate":
		request := read(c, &mlxpool.GenerateRequest{})
		return watch(client.Generate(ctx, request), c.CancelAfterEvents, cancel)
	case "LoadModel":
		request := read(c, &mlxpool.LoadModelRequest{})
		return watch(client.Load(ctx, request), c.CancelAfterEvents, cancel)
	case "CountTokens":
		return answer(client.Models.CountTokens(ctx, read(c, &mlxpoolv1.CountTokensRequest{})))
	case "Tokenize":
		return answer(client.Models.Tokenize(ctx, read(c, &mlxpoolv1.TokenizeRequest{})))
	case "GetModel":
		return answer(client.Models.GetModel(ctx, read(c, &mlxpoolv1.GetModelRequest{})))
	case "CancelGeneration":
		return answer(client.Models.CancelGeneration(ctx, read(c, &mlxpoolv1.CancelGenerationRequest{})))
	}
	log.Fatalf("no such method: %s", c.Method)
	return nil
}

func read[M proto.Message](c *call, request M) M {
	if err := protojson.Unmarshal(c.Request, request); err != nil {
		log.Fatal(err)
	}
	return request
}

func asJSON(message proto.Message) json.RawMessage {
	encoded, err := protojson.Marshal(message)
	if err != nil {
		log.Fatal(err)
	}
	return encoded
}

func answer[M proto.Message](response M, err error) error {
	if err == nil {
		write(map[string]any{"response": asJSON(response)})
	}
	return err
}

// watch cancels the context after so many events, as a caller does whose own work was given up.
func watch[E proto.Message](events iter.Seq2[E, error], cancelAfter int, cancel func()) error {
	count := 0
	for event, err := range events {
		if err != nil {
			return err
		}
		write(map[string]any{"event": map[string]any{kind(event): asJSON(event)}})
		if count++; count == cancelAfter {
			cancel()
		}
	}
	return nil
}

func kind(event proto.Message) string {
	switch event.(type) {
	case *mlxpool.Started:
		return "started"
	case *mlxpool.Progress, *mlxpool.LoadProgress:
		return "progress"
	case *mlxpool.Delta:
		return "delta"
	}
	return "finished"
}

func ending(err error) end {
	if err == nil {
		return end{Code: "OK"}
	}
	var failure *mlxpool.Error
	if !errors.As(err, &failure) {
		return end{Code: "OK", Message: err.Error()}
	}
	e := end{
		Code:     codeNames[failure.Code],
		Reason:   failure.Reason,
		Message:  failure.Message,
		Metadata: failure.Metadata,
	}
	for _, each := range failure.FieldViolations {
		e.Violations = append(e.Violations, violation(each))
	}
	if failure.RetryAfter != 0 {
		seconds := failure.RetryAfter.Seconds()
		e.RetryAfter = &seconds
	}
	return e
}

var codeNames = map[codes.Code]string{
	codes.Canceled:           "CANCELLED",
	codes.Unknown:            "UNKNOWN",
	codes.InvalidArgument:    "INVALID_ARGUMENT",
	codes.DeadlineExceeded:   "DEADLINE_EXCEEDED",
	codes.NotFound:           "NOT_FOUND",
	codes.AlreadyExists:      "ALREADY_EXISTS",
	codes.PermissionDenied:   "PERMISSION_DENIED",
	codes.ResourceExhausted:  "RESOURCE_EXHAUSTED",
	codes.FailedPrecondition: "FAILED_PRECONDITION",
	codes.Aborted:            "ABORTED",
	codes.OutOfRange:         "OUT_OF_RANGE",
	codes.Unimplemented:      "UNIMPLEMENTED",
	codes.Internal:           "INTERNAL",
	codes.Unavailable:        "UNAVAILABLE",
	codes.DataLoss:           "DATA_LOSS",
	codes.Unauthenticated:    "UNAUTHENTICATED",
}
