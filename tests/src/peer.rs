//! Backends that do not what they should: each a socket and, at most, one thread.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::scratch::Scratch;

/// A listening socket and what becomes of those who connect.
#[derive(Debug)]
pub struct Peer {
    scratch: Scratch,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// Accepts one connection, and hands it to `serve`.
    ///
    /// # Panics
    /// When the socket cannot be made.
    pub fn new(serve: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let scratch = Scratch::new();
        let listener = UnixListener::bind(scratch.path("peer")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !asked.load(Ordering::Acquire) {
                if let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(false).unwrap();
                    // A peer that waits for more must not outlive its test.
                    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
                    return serve(stream);
                }
                thread::sleep(Duration::from_millis(2));
            }
        });
        Self { scratch, stop, thread: Some(thread) }
    }

    /// Reads what comes and never answers.
    #[must_use]
    pub fn silent() -> Self {
        Self::new(|mut stream| while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {})
    }

    /// Answers the first request with `bytes`, then reads on.
    #[must_use]
    pub fn answering(bytes: &'static [u8]) -> Self {
        Self::new(move |mut stream| {
            if matches!(stream.read(&mut [0; 4096]), Ok(1..)) && stream.write_all(bytes).is_ok() {
                while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}
            }
        })
    }

    /// Closes the connection at the first request.
    #[must_use]
    pub fn closing() -> Self {
        Self::new(|mut stream| {
            if stream.read(&mut [0; 12]).is_err() {
                eprintln!("nobody asked this peer anything");
            }
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.scratch.path("peer")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("a peer's thread panicked");
        }
    }
}

/// A socket file on which nobody listens any more.
///
/// # Panics
/// When it cannot be made.
pub fn stale_socket(path: &Path) {
    drop(UnixListener::bind(path).unwrap());
}
