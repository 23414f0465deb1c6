//! Reaching a backend: it starts late, it connects to us, it never comes; and what a trace shows.

#![cfg(test)]

mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::{Scratch, whole_life};
use transport::peer::socket::Attempts;
use transport::peer::socket::Listener;
use transport::peer::{Limits, Trace, TraceEvent};
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::{Connection, Wanted};

fn limits() -> Limits {
    Limits::new(Duration::from_millis(500))
}

#[test]
fn a_backend_that_starts_late_is_waited_for() {
    let scratch = Scratch::new();
    let path = scratch.path("s");
    let late = path.clone();
    let starter = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        ScriptedBackend::listen(&late, Offer::default(), Script::normal()).unwrap()
    });
    let mut attempts = Attempts::lasting(Some(Duration::from_secs(5)));
    let connection = Connection::connect_patiently(&path, &limits(), &mut attempts).unwrap();
    assert!(connection.negotiate(&Wanted::default()).is_ok());
    drop(starter.join().unwrap());
}

#[test]
fn a_backend_that_never_starts_ends_the_wait() {
    let scratch = Scratch::new();
    let begin = Instant::now();
    let mut attempts = Attempts::lasting(Some(Duration::from_millis(100)));
    let error = Connection::connect_patiently(&scratch.path("s"), &limits(), &mut attempts).err().unwrap();
    assert!(error.is_absent());
    assert!(error.hint().unwrap().contains("start the backend first"));
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_backend_that_connects_to_us_is_served_again_and_again() {
    let scratch = Scratch::new();
    let listener = Listener::bind(&scratch.path("s")).unwrap();
    for _ in 0..3 {
        let backend = ScriptedBackend::dial(listener.path(), Offer::default(), Script::normal()).unwrap();
        let connection = Connection::accept(&listener, &limits()).unwrap();
        assert!(connection.negotiate(&Wanted::default()).is_ok());
        assert_eq!(backend.breaches(), Vec::<String>::new());
    }
    let error = Connection::accept(&listener, &Limits::new(Duration::from_millis(50))).err().unwrap();
    let text = format!("vhost-user backend {} did not connect within 50 ms", listener.path().display());
    assert_eq!(error.to_string(), text);
}

#[test]
fn an_abstract_name_is_reached() {
    let name = format!("@outboard-sockets-{}", std::process::id());
    let listener = Listener::bind(Path::new(&name)).unwrap();
    let _client = Connection::connect(Path::new(&name), &limits()).unwrap();
    assert!(Connection::accept(&listener, &limits()).is_ok());
}

#[test]
fn a_backend_that_dies_is_noticed_at_once_not_at_the_deadline() {
    let (backend, stream) = ScriptedBackend::pair(Offer::default(), Script::normal()).unwrap();
    let limits = Limits::new(Duration::from_secs(60));
    let connection = Connection::from_stream(stream, "scripted", &limits).unwrap();
    let mut session = connection.negotiate(&Wanted::default()).unwrap();
    backend.hang_up();
    let begin = Instant::now();
    assert!(session.read_config(60).unwrap_err().is_fatal());
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_trace_shows_every_message_in_order() {
    #[derive(Default)]
    struct Lines(Mutex<Vec<String>>);
    impl Trace for Lines {
        fn message(&self, event: &TraceEvent<'_>) {
            self.0.lock().unwrap().push(event.to_string());
        }
    }
    let lines = Arc::new(Lines::default());
    let (backend, stream) = ScriptedBackend::pair(Offer::default(), Script::normal()).unwrap();
    let traced = limits().traced(Arc::clone(&lines) as Arc<dyn Trace>);
    let session = whole_life(stream, &traced, &Wanted::default()).unwrap();
    let lines = lines.0.lock().unwrap();
    let sent: Vec<&str> = lines
        .iter()
        .filter(|line| line.contains(" > "))
        .map(|line| line.split(' ').nth(2).unwrap())
        .collect();
    assert_eq!(sent, backend.conversation());
    let answers = lines.iter().filter(|line| line.contains(" < ")).count();
    assert_eq!(u64::try_from(answers).unwrap(), session.stats().answers);
    assert_eq!(lines[0], "scripted > GET_FEATURES");
}
