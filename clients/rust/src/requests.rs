//! Short ways to write requests and to read messages.

use crate::v1::content_part::Part;
use crate::v1::generation_delta::Content;
use crate::v1::prompt::Input;
use crate::v1::{
    ChatMessage, ChatPrompt, ContentPart, GenerateRequest, GenerationDelta, Prompt, Role,
};

impl GenerateRequest {
    /// Ask `model` to answer `messages`; set more fields before you send it.
    pub fn chat(model: impl Into<String>, messages: impl IntoIterator<Item = ChatMessage>) -> Self {
        let messages = messages.into_iter().collect();
        Self::of(model, Input::Chat(ChatPrompt { messages, ..Default::default() }))
    }

    /// Ask `model` to go on with `text`, which no template changes.
    pub fn text(model: impl Into<String>, text: impl Into<String>) -> Self {
        Self::of(model, Input::Text(text.into()))
    }

    fn of(model: impl Into<String>, input: Input) -> Self {
        let prompt = Some(Prompt { input: Some(input) });
        Self { model: model.into(), prompt, ..Default::default() }
    }
}

/// A message that sets the model's task.
pub fn system(text: impl Into<String>) -> ChatMessage {
    message(Role::System, text)
}

/// A message of the person who asks.
pub fn user(text: impl Into<String>) -> ChatMessage {
    message(Role::User, text)
}

/// A message of the model; what it said itself is `GenerationFinished::message`.
pub fn assistant(text: impl Into<String>) -> ChatMessage {
    message(Role::Assistant, text)
}

/// The answer to the tool call with that id.
pub fn tool_result(tool_call_id: impl Into<String>, text: impl Into<String>) -> ChatMessage {
    ChatMessage { tool_call_id: tool_call_id.into(), ..message(Role::Tool, text) }
}

/// A delta's text; empty for thoughts, tool calls, and deltas that have only ids.
pub fn delta_text(delta: &GenerationDelta) -> &str {
    match &delta.content {
        Some(Content::Text(text)) => text,
        _ => "",
    }
}

/// A message's text, without thoughts and tool calls.
pub fn message_text(message: &ChatMessage) -> String {
    let texts = message.content.iter().map(|part| match &part.part {
        Some(Part::Text(text)) => text.as_str(),
        _ => "",
    });
    texts.collect()
}

fn message(role: Role, text: impl Into<String>) -> ChatMessage {
    let content = vec![ContentPart { part: Some(Part::Text(text.into())) }];
    ChatMessage { role: role.into(), content, ..Default::default() }
}
