// Package mlxpool calls mlxpool servers: tokens as they come, typed errors, retries by the
// contract's rules.
//
//	client, err := mlxpool.New("127.0.0.1:50051")
//	...
//	request := mlxpool.ChatRequest("demo", mlxpool.User("Name three colours."))
//	for event, err := range client.Generate(ctx, request) {
//		if err != nil {
//			return err
//		}
//		if delta, ok := event.(*mlxpool.Delta); ok {
//			fmt.Print(delta.GetText())
//		}
//	}
//
// Requests and events are the contract's own messages, under shorter names. Errors are *Error.
package mlxpool
