//! `--trace FILE|-`: one line for every protocol message.
//!
//! ```text
//!    30.408 ms  /run/blk.sock > SET_VRING_ENABLE ring=0 num=1 need_reply
//!    30.482 ms  /run/blk.sock < SET_VRING_ENABLE value=0x0 (59 us)
//! ```
//! `>` is our request and `<` the answer to it. `<<` is a request of the backend on its own channel and `>>`
//! our answer to it.
//!
//! Without a trace, each message costs one comparison. A trace is written without a buffer, so that a crash
//! loses no line.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use transport::peer::{Trace, TraceEvent};

use crate::error::Error;

/// Writes messages as lines.
pub struct Tracer {
    begun: Instant,
    out: Mutex<Box<dyn Write + Send>>,
}

impl Tracer {
    /// Traces to the file at `target`, created or truncated, or to standard error for `-`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn open(target: &Path) -> Result<Arc<Self>, Error> {
        if target.as_os_str() == "-" {
            return Ok(Self::to(Box::new(StandardError)));
        }
        let file = File::create(target).map_err(|error| {
            let hint = "is the path right? `--trace -` writes to standard error";
            Error::usage(format!("cannot write the trace to {}", target.display())).because(error).hint(hint)
        })?;
        Ok(Self::to(Box::new(file)))
    }

    /// Traces to `out`.
    pub fn to(out: Box<dyn Write + Send>) -> Arc<Self> {
        Arc::new(Tracer { begun: Instant::now(), out: Mutex::new(out) })
    }
}

impl Trace for Tracer {
    fn message(&self, event: &TraceEvent<'_>) {
        let time = self.begun.elapsed();
        let (millis, micros) = (time.as_millis(), time.subsec_micros() % 1000);
        let line = format!("{millis:>6}.{micros:03} ms  {event}\n");
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = out.write_all(line.as_bytes()) {
            log::debug!("a line of the trace is lost: {error}");
        }
    }
}

/// Standard error, which may have no reader.
struct StandardError;

impl Write for StandardError {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        crate::logging::write(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_a_line_a_message() {
        let shared: Arc<Mutex<Vec<u8>>> = Arc::default();
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let tracer = Tracer::to(Box::new(Sink(Arc::clone(&shared))));
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(theirs);
        let limits = transport::peer::Limits::new(std::time::Duration::from_millis(100)).traced(tracer);
        let connection = transport::vhost_user::Connection::from_stream(ours, "peer", &limits).unwrap();
        assert!(connection.negotiate(&transport::vhost_user::Wanted::default()).is_err());
        let text = String::from_utf8(shared.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("ms  peer > GET_FEATURES"), "{text}");
    }
}
