// A conversation with a model: go run ./examples/chat [-target HOST:PORT] [-model NAME]
//
// Ctrl-C stops an answer, Ctrl-D leaves.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"time"

	"google.golang.org/protobuf/proto"

	"mlxpool"
)

func main() {
	target := flag.String("target", mlxpool.DefaultTarget, "`host:port` of the server")
	model := flag.String("model", "demo", "the model's `name`")
	ca := flag.String("ca", "", "PEM `file` of the authority to trust; turns TLS on")
	maxTokens := flag.Int("max-tokens", 500, "how long an answer may be")
	flag.Parse()
	log.SetFlags(0)
	limits := &mlxpool.StopConditions{MaxTokens: proto.Int32(int32(*maxTokens))}
	if err := chat(*target, *model, *ca, limits); err != nil {
		log.Fatal(err)
	}
}

func chat(target, model, ca string, limits *mlxpool.StopConditions) error {
	with := []mlxpool.Option{mlxpool.WithAPIKey(os.Getenv("MLXPOOL_API_KEY"))}
	if ca != "" {
		config, err := mlxpool.TLSFiles(ca, "", "")
		if err != nil {
			return err
		}
		with = append(with, mlxpool.WithTLS(config))
	}
	client, err := mlxpool.New(target, with...)
	if err != nil {
		return err
	}
	defer client.Close()
	ready, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := client.WaitReady(ready); err != nil {
		return err
	}

	var messages []*mlxpool.ChatMessage
	for lines := bufio.NewScanner(os.Stdin); prompt() && lines.Scan(); {
		messages = append(messages, mlxpool.User(lines.Text()))
		request := mlxpool.ChatRequest(model, messages...)
		request.Sampling = &mlxpool.SamplingParams{Temperature: proto.Float32(0)}
		request.Stop = limits
		answer, err := say(client, request)
		switch {
		case errors.Is(err, context.Canceled):
			// The question goes with its answer.
			messages = messages[:len(messages)-1]
		case errors.Is(err, mlxpool.ReasonPromptTooLong):
			return fmt.Errorf("the conversation is longer than the model's context: %w", err)
		case err != nil:
			return err
		default:
			messages = append(messages, answer)
		}
	}
	return nil
}

func prompt() bool {
	fmt.Print("> ")
	return true
}

// say prints an answer while it comes, and returns it.
func say(client *mlxpool.Client, request *mlxpool.GenerateRequest) (*mlxpool.ChatMessage, error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	defer fmt.Println()
	var answer *mlxpool.ChatMessage
	for event, err := range client.Generate(ctx, request) {
		if err != nil {
			return nil, err
		}
		switch event := event.(type) {
		case *mlxpool.Delta:
			fmt.Print(event.GetText())
		case *mlxpool.Finished:
			answer = event.GetMessage()
		}
	}
	return answer, nil
}
