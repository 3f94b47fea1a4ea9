//! A conversation with a model: cargo run --example chat [HOST:PORT [MODEL [MAX_TOKENS]]]
//!
//! Ctrl-C stops an answer, Ctrl-D leaves. $MLXPOOL_API_KEY is sent; $MLXPOOL_CA, a PEM file with the
//! authority to trust, turns TLS on.

use std::env;
use std::io::{Write, stdin, stdout};
use std::time::Duration;

use mlxpool::{
    ChatMessage, Client, DEFAULT_TARGET, Error, Event, EventStream, GenerateRequest, Options,
    SamplingParams, StopConditions, Tls, delta_text, user,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let argument = |index: usize| arguments.get(index).map(String::as_str);
    let options = Options {
        tls: env::var("MLXPOOL_CA").ok().map(|ca| Tls { ca: Some(ca.into()), identity: None }),
        api_key: env::var("MLXPOOL_API_KEY").ok(),
        ..Default::default()
    };
    let client = Client::with_options(argument(0).unwrap_or(DEFAULT_TARGET), &options)?;
    client.wait_until_ready(Duration::from_secs(10)).await?;

    let model = argument(1).unwrap_or("demo");
    let max_tokens = argument(2).unwrap_or("500").parse()?;
    let mut messages = Vec::new();
    while let Some(question) = ask()? {
        messages.push(user(question));
        let mut request = GenerateRequest::chat(model, messages.clone());
        request.sampling = Some(SamplingParams { temperature: Some(0.0), ..Default::default() });
        request.stop = Some(StopConditions { max_tokens: Some(max_tokens), ..Default::default() });
        let answer = tokio::select! {
            answer = say(client.generate(request)) => answer?,
            // The stream is dropped, which cancels it.
            _ = tokio::signal::ctrl_c() => None,
        };
        println!();
        match answer {
            Some(answer) => messages.push(answer),
            // The question goes with its answer.
            None => drop(messages.pop()),
        }
    }
    Ok(())
}

/// One line of the standard input; `None` at its end.
fn ask() -> std::io::Result<Option<String>> {
    print!("> ");
    stdout().flush()?;
    let mut line = String::new();
    Ok((stdin().read_line(&mut line)? > 0).then(|| line.trim_end().to_owned()))
}

/// Print an answer while it comes, and return it.
async fn say(mut events: EventStream<Event>) -> Result<Option<ChatMessage>, Error> {
    let mut answer = None;
    while let Some(event) = events.next().await {
        match event? {
            Event::Delta(delta) => {
                print!("{}", delta_text(&delta));
                // A terminal that is gone is noticed by the next line.
                let _ = stdout().flush();
            }
            Event::Finished(finished) => answer = finished.message,
            _ => {}
        }
    }
    Ok(answer)
}
