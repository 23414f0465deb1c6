//! A client of QEMU's machine protocol: one command, one answer, events passed over.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::wait::patience;

/// A connection past its greeting.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Panics
    /// When nobody answers as QMP does.
    #[must_use]
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        stream.set_read_timeout(Some(patience(Duration::from_secs(10)))).unwrap();
        let mut qmp = Self { stream: BufReader::new(stream) };
        let greeting = qmp.receive();
        assert!(greeting.get("QMP").is_some(), "no QMP greeting: {greeting}");
        qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("the monitor answers");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("the monitor says {line:?}: {error}"))
    }

    /// Runs one command and returns what came back.
    ///
    /// # Panics
    /// When the monitor refuses it or does not answer.
    #[expect(clippy::needless_pass_by_value, reason = "callers write json!() in place")]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes()).expect("the monitor listens");
        loop {
            let answer = self.receive();
            if let Some(found) = answer.get("return") {
                return found.clone();
            }
            assert!(answer.get("error").is_none(), "{command}: {answer}");
        }
    }
}
