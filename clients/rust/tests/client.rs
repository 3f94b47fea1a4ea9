//! The client against a server that does what the test says.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mlxpool::v1::model_service_server::{ModelService, ModelServiceServer};
use mlxpool::v1::*;
use mlxpool::{Client, Code, Error, Event, Options, Tls, message_text, reason};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};

const PATIENCE: Duration = Duration::from_secs(20);

/// Sends what it is given to every call of Generate; keys are those of GetModel's callers.
#[derive(Clone, Default)]
struct Fake {
    events: Vec<Event>,
    hangs: bool,
    refusal: Option<Status>,
    keys: Arc<Mutex<Vec<Option<String>>>>,
    /// Hears of it when the caller of a hanging call has left.
    left: Option<mpsc::Sender<()>>,
}

#[tonic::async_trait]
impl ModelService for Fake {
    async fn generate(
        &self,
        _: Request<GenerateRequest>,
    ) -> Result<Response<BoxStream<GenerateResponse>>, Status> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.clone());
        }
        let (sender, receiver) = mpsc::channel(16);
        for event in self.events.clone() {
            sender.send(Ok(GenerateResponse { event: Some(event) })).await.unwrap();
        }
        if self.hangs {
            let left = self.left.clone();
            tokio::spawn(async move {
                sender.closed().await;
                if let Some(left) = left {
                    left.send(()).await.unwrap();
                }
            });
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn get_model(
        &self,
        request: Request<GetModelRequest>,
    ) -> Result<Response<GetModelResponse>, Status> {
        let key = request.metadata().get("authorization");
        self.keys.lock().unwrap().push(key.map(|key| key.to_str().unwrap().to_owned()));
        match &self.refusal {
            Some(refusal) => Err(refusal.clone()),
            None => Ok(Response::new(GetModelResponse::default())),
        }
    }
}

async fn serve(fake: Fake) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder().add_service(ModelServiceServer::new(fake));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

async fn client_of(fake: Fake) -> Client {
    Client::new(&serve(fake).await.to_string()).unwrap().with_timeout(PATIENCE)
}

fn request() -> GenerateRequest {
    GenerateRequest::text("m", "p")
}

fn finished(text: &str) -> Event {
    let message = Some(mlxpool::assistant(text));
    Event::Finished(GenerationFinished { message, ..Default::default() })
}

fn started() -> Event {
    Event::Started(GenerationStarted { seed: i64::MIN, ..Default::default() })
}

#[tokio::test]
async fn events_come_in_order() {
    let client = client_of(Fake { events: vec![started(), finished("yes")], ..Default::default() });
    let mut events = client.await.generate(request());
    assert_eq!(events.next().await.unwrap().unwrap(), started());
    assert_eq!(events.next().await.unwrap().unwrap(), finished("yes"));
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn result_is_the_last_event() {
    let client = client_of(Fake { events: vec![started(), finished("yes")], ..Default::default() });
    let last = client.await.generate(request()).result().await.unwrap();
    assert_eq!(message_text(&last.message.unwrap()), "yes");
}

#[tokio::test]
async fn dropping_the_stream_cancels_the_call() {
    let (left, mut heard) = mpsc::channel(1);
    let fake =
        Fake { events: vec![started()], hangs: true, left: Some(left), ..Default::default() };
    let mut events = client_of(fake).await.generate(request());
    events.next().await.unwrap().unwrap();
    drop(events);
    tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stream_without_its_last_event_is_incomplete() {
    let client = client_of(Fake { events: vec![started()], ..Default::default() }).await;
    let error = client.generate(request()).result().await.unwrap_err();
    assert!(error.is_incomplete(), "{error}");
}

#[tokio::test]
async fn the_details_of_an_error_are_its_fields() {
    let mut details = ErrorDetails::new();
    details
        .set_error_info("RATE_LIMITED", "mlxpool", [("a".into(), "b".into())])
        .set_bad_request(vec![tonic_types::FieldViolation::new("f", "d")])
        .set_retry_info(Some(Duration::from_millis(1500)));
    let refusal = Status::with_error_details(Code::ResourceExhausted, "slowly", details);
    let client = client_of(Fake { refusal: Some(refusal), ..Default::default() }).await;
    let of_a_stream = client.generate(request()).result().await.unwrap_err();
    let of_a_call = client.get_model(GetModelRequest::default()).await.unwrap_err();
    for error in [of_a_stream, of_a_call] {
        assert_eq!(error.code, Code::ResourceExhausted);
        assert_eq!(error.reason, reason::RATE_LIMITED);
        assert_eq!(error.message, "slowly");
        assert_eq!(error.metadata["a"], "b");
        assert_eq!(error.field_violations[0].field, "f");
        assert_eq!(error.retry_after, Some(Duration::from_millis(1500)));
        assert_eq!(error.to_string(), "RATE_LIMITED: slowly");
    }
}

#[tokio::test]
async fn a_timeout_is_deadline_exceeded() {
    let fake = Fake { events: vec![started()], hangs: true, ..Default::default() };
    let client = client_of(fake).await.with_timeout(Duration::from_millis(200));
    let error = client.generate(request()).result().await.unwrap_err();
    assert_eq!(error.code, Code::DeadlineExceeded);
}

#[tokio::test]
async fn the_key_is_sent_with_every_call() {
    let fake = Fake::default();
    let address = serve(fake.clone()).await.to_string();
    for api_key in [None, Some("secret".to_owned())] {
        let options = Options { api_key, timeout: Some(PATIENCE), ..Default::default() };
        let client = Client::with_options(&address, &options).unwrap();
        client.get_model(GetModelRequest::default()).await.unwrap();
    }
    assert_eq!(*fake.keys.lock().unwrap(), [None, Some("Bearer secret".to_owned())]);
}

fn with_key(target: &str, key: &str, options: Options) -> Result<Client, Error> {
    Client::with_options(target, &Options { api_key: Some(key.to_owned()), ..options })
}

#[tokio::test]
async fn a_key_stays_here_or_is_encrypted_unless_told_otherwise() {
    for target in ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/m"] {
        with_key(target, "secret", Options::default()).unwrap();
    }
    for target in ["model.example:1", "10.0.0.1:1", "127.example:1"] {
        let error = with_key(target, "secret", Options::default()).unwrap_err();
        assert!(error.message.contains("plaintext"), "{error}");
        let trusted = Options { plaintext_key: true, ..Default::default() };
        with_key(target, "secret", trusted).unwrap();
    }
    for wrong in ["", "secret\n", "two words", "schlüssel"] {
        with_key("127.0.0.1:1", wrong, Options::default()).unwrap_err();
    }
}

#[tokio::test]
async fn files_that_are_missing_are_errors() {
    let tls = Tls { ca: Some("/missing.crt".into()), identity: None };
    let options = Options { tls: Some(tls), ..Default::default() };
    let error = Client::with_options("127.0.0.1:1", &options).unwrap_err();
    assert!(error.message.contains("/missing.crt"), "{error}");
}

#[tokio::test]
async fn wait_until_ready_ends() {
    client_of(Fake::default()).await.wait_until_ready(PATIENCE).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let nobody = Client::new(&address).unwrap();
    let error = nobody.wait_until_ready(Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable);
}

#[test]
fn messages_have_their_role_and_text() {
    for (message, role) in [
        (mlxpool::system("a"), Role::System),
        (mlxpool::user("a"), Role::User),
        (mlxpool::assistant("a"), Role::Assistant),
        (mlxpool::tool_result("c", "a"), Role::Tool),
    ] {
        assert_eq!(message.role(), role);
        assert_eq!(message_text(&message), "a");
    }
}
