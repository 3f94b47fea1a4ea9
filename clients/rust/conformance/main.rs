//! The Rust client behind the conformance suite's protocol: tests/conformance/README.md.

use std::io::{BufRead, Write, stdin, stdout};
use std::time::Duration;

use mlxpool::v1::{GenerateResponse, LoadModelResponse};
use mlxpool::{Client, Code, Error, EventStream, Options, Tls};
use prost_reflect::prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::{Value, json};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

enum End {
    Ok,
    Cancelled,
    Failed(Error),
}

/// ProtoJSON needs the contract's descriptors.
struct Json(DescriptorPool);

impl Json {
    fn read<M: Message + Default>(&self, name: &str, value: &Value) -> Fallible<M> {
        let message = DynamicMessage::deserialize(self.descriptor(name)?, value)?;
        Ok(message.transcode_to()?)
    }

    fn write(&self, name: &str, message: &impl Message) -> Fallible<Value> {
        let mut dynamic = DynamicMessage::new(self.descriptor(name)?);
        dynamic.transcode_from(message)?;
        Ok(serde_json::to_value(dynamic)?)
    }

    fn descriptor(&self, name: &str) -> Fallible<prost_reflect::MessageDescriptor> {
        let full_name = format!("mlxpool.v1.{name}");
        Ok(self.0.get_message_by_name(&full_name).ok_or(full_name)?)
    }
}

#[tokio::main]
async fn main() -> Fallible<()> {
    let json = Json(DescriptorPool::decode(&include_bytes!("descriptors.binpb")[..])?);
    for line in stdin().lock().lines() {
        let call: Value = serde_json::from_str(&line?)?;
        let end = match perform(&json, &call).await? {
            End::Ok => json!({"code": "OK"}),
            End::Cancelled => json!({"code": "CANCELLED"}),
            End::Failed(error) => ending(&error),
        };
        say(&json!({ "end": end }))?;
    }
    Ok(())
}

fn say(line: &Value) -> Fallible<()> {
    let mut out = stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

async fn perform(json: &Json, call: &Value) -> Fallible<End> {
    let text = |name: &str| call[name].as_str().map(str::to_owned);
    let options = Options {
        tls: text("tls_ca").map(|ca| Tls { ca: Some(ca.into()), identity: None }),
        api_key: text("api_key"),
        wait_for_ready: call["wait_for_ready"].as_bool().unwrap_or_default(),
        timeout: call["timeout_s"].as_f64().map(Duration::from_secs_f64),
        ..Default::default()
    };
    let client = Client::with_options(&text("target").ok_or("no target")?, &options)?;
    let request = &call["request"];
    let cancel_after = call["cancel_after_events"].as_u64();
    macro_rules! unary {
        ($call:ident, $name:literal) => {{
            let request = json.read(concat!($name, "Request"), request)?;
            match client.$call(request).await {
                Err(error) => Ok(End::Failed(error)),
                Ok(response) => {
                    let response = json.write(concat!($name, "Response"), &response)?;
                    say(&json!({ "response": response }))?;
                    Ok(End::Ok)
                }
            }
        }};
    }
    match call["method"].as_str() {
        Some("Generate") => {
            let events = client.generate(json.read("GenerateRequest", request)?);
            watch(events, cancel_after, |event| {
                json.write("GenerateResponse", &GenerateResponse { event: Some(event) })
            })
            .await
        }
        Some("LoadModel") => {
            let events = client.load(json.read("LoadModelRequest", request)?);
            watch(events, cancel_after, |event| {
                json.write("LoadModelResponse", &LoadModelResponse { event: Some(event) })
            })
            .await
        }
        Some("CountTokens") => unary!(count_tokens, "CountTokens"),
        Some("Tokenize") => unary!(tokenize, "Tokenize"),
        Some("GetModel") => unary!(get_model, "GetModel"),
        Some("CancelGeneration") => unary!(cancel_generation, "CancelGeneration"),
        _ => Err("no such method".into()),
    }
}

async fn watch<E>(
    mut events: EventStream<E>,
    cancel_after: Option<u64>,
    to_json: impl Fn(E) -> Fallible<Value>,
) -> Fallible<End> {
    let mut count = 0;
    while let Some(event) = events.next().await {
        match event {
            Err(error) => return Ok(End::Failed(error)),
            Ok(event) => say(&json!({ "event": to_json(event)? }))?,
        }
        count += 1;
        if Some(count) == cancel_after {
            // Dropping a stream is how it is cancelled: nobody is left to be told.
            drop(events);
            return Ok(End::Cancelled);
        }
    }
    Ok(End::Ok)
}

fn ending(error: &Error) -> Value {
    let violations: Vec<Value> = error
        .field_violations
        .iter()
        .map(|each| json!({"field": each.field, "description": each.description}))
        .collect();
    json!({
        "code": code_name(error.code),
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "field_violations": violations,
        "retry_after_s": error.retry_after.map(|wait| wait.as_secs_f64()),
    })
}

/// `NotFound` as `NOT_FOUND`.
fn code_name(code: Code) -> String {
    if code == Code::Ok {
        return "OK".into();
    }
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}
