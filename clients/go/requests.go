package mlxpool

import (
	"strings"

	mlxpoolv1 "mlxpool/gen/go/mlxpool/v1"
)

// The contract's requests and their parts, under shorter names; the rest is in the generated
// package. Unset optional fields are the model's or server's default: proto.Float32(0) sets one.
type (
	GenerateRequest  = mlxpoolv1.GenerateRequest
	LoadModelRequest = mlxpoolv1.LoadModelRequest
	ChatMessage      = mlxpoolv1.ChatMessage
	ChatPrompt       = mlxpoolv1.ChatPrompt
	Prompt           = mlxpoolv1.Prompt
	SamplingParams   = mlxpoolv1.SamplingParams
	StopConditions   = mlxpoolv1.StopConditions
	OutputConstraint = mlxpoolv1.OutputConstraint
	OutputOptions    = mlxpoolv1.OutputOptions
	Tool             = mlxpoolv1.Tool
	ToolCall         = mlxpoolv1.ToolCall
)

// ChatRequest asks model to answer messages; set more fields before you send it.
func ChatRequest(model string, messages ...*ChatMessage) *GenerateRequest {
	chat := &ChatPrompt{Messages: messages}
	return &GenerateRequest{
		Model:  model,
		Prompt: &Prompt{Input: &mlxpoolv1.Prompt_Chat{Chat: chat}},
	}
}

// TextRequest asks model to go on with text, which no template changes.
func TextRequest(model, text string) *GenerateRequest {
	return &GenerateRequest{
		Model:  model,
		Prompt: &Prompt{Input: &mlxpoolv1.Prompt_Text{Text: text}},
	}
}

// System, User and Assistant are a message of that role. Finished.Message is one, too: append it.
func System(text string) *ChatMessage    { return message(mlxpoolv1.Role_ROLE_SYSTEM, text) }
func User(text string) *ChatMessage      { return message(mlxpoolv1.Role_ROLE_USER, text) }
func Assistant(text string) *ChatMessage { return message(mlxpoolv1.Role_ROLE_ASSISTANT, text) }

// ToolResult answers the call with that id.
func ToolResult(callID, text string) *ChatMessage {
	answer := message(mlxpoolv1.Role_ROLE_TOOL, text)
	answer.ToolCallId = callID
	return answer
}

// Text is a message's text, without thoughts and tool calls.
func Text(message *ChatMessage) string {
	var text strings.Builder
	for _, part := range message.GetContent() {
		text.WriteString(part.GetText())
	}
	return text.String()
}

func message(role mlxpoolv1.Role, text string) *ChatMessage {
	part := &mlxpoolv1.ContentPart{Part: &mlxpoolv1.ContentPart_Text{Text: text}}
	return &ChatMessage{Role: role, Content: []*mlxpoolv1.ContentPart{part}}
}
