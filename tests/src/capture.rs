//! What a child writes, collected by a thread so that the child never waits for us.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::wait::{Allowance, ROUND, patience};

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    collected: Mutex<Collected>,
    more: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.collected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream of a child.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Reads `from` until it ends.
    pub fn new(mut from: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let filled = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            let mut chunk = [0; 4096];
            // A pseudo terminal ends with EIO.
            while let Ok(count @ 1..) = from.read(&mut chunk) {
                filled.lock().bytes.extend_from_slice(&chunk[..count]);
                filled.more.notify_all();
            }
            filled.lock().ended = true;
            filled.more.notify_all();
        });
        Self { shared, thread: Some(thread) }
    }

    /// All text so far, from byte `from` on.
    #[must_use]
    pub fn text_from(&self, from: usize) -> String {
        let collected = self.shared.lock();
        String::from_utf8_lossy(collected.bytes.get(from..).unwrap_or_default()).into_owned()
    }

    /// All text so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.text_from(0)
    }

    /// The place just after `wanted`, at or after byte `from`, waited for at most `patience(limit)`.
    ///
    /// # Errors
    /// What was seen instead, when the stream ends or the time is up first.
    pub fn find(&self, wanted: &str, from: usize, limit: Duration) -> Result<usize, String> {
        let mut left = Allowance::new(limit);
        let mut collected = self.shared.lock();
        let mut searched = from;
        loop {
            let begin = searched.min(collected.bytes.len());
            let tail = &collected.bytes[begin..];
            if let Some(at) = tail.windows(wanted.len()).position(|window| window == wanted.as_bytes()) {
                return Ok(begin + at + wanted.len());
            }
            searched = collected.bytes.len().saturating_sub(wanted.len()).max(from);
            if collected.ended || left.is_spent() {
                let why = if collected.ended { "the stream ended" } else { "the time is up" };
                return Err(format!("{wanted:?} did not come: {why} ({:?} allowed)", patience(limit)));
            }
            collected = self.wait_a_round(collected, &mut left);
        }
    }

    fn wait_a_round<'a>(
        &'a self,
        collected: MutexGuard<'a, Collected>,
        left: &mut Allowance,
    ) -> MutexGuard<'a, Collected> {
        let begun = Instant::now();
        let waited = self.shared.more.wait_timeout(collected, ROUND);
        left.slept(begun.elapsed());
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits for the end of the stream, which comes with that of its last writer.
    ///
    /// # Panics
    /// When somebody keeps the stream open for longer than `patience(limit)`: a process was left behind.
    pub fn finish(&mut self, limit: Duration) {
        let mut left = Allowance::new(limit);
        let mut collected = self.shared.lock();
        while !collected.ended {
            assert!(!left.is_spent(), "a process still holds the output after the program has ended");
            collected = self.wait_a_round(collected, &mut left);
        }
        drop(collected);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// The last `count` lines of `text`.
#[must_use]
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_word_that_comes_in_two_pieces_is_found_once() {
        let (theirs, mut ours) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut capture = Capture::new(theirs);
        ours.write_all(b"one tw").unwrap();
        assert_eq!(capture.find("one", 0, Duration::from_secs(5)), Ok(3));
        ours.write_all(b"o three").unwrap();
        assert_eq!(capture.find("two", 3, Duration::from_secs(5)), Ok(7));
        drop(ours);
        assert!(capture.find("one", 1, Duration::from_secs(5)).unwrap_err().contains("the stream ended"));
        capture.finish(Duration::from_secs(5));
        assert_eq!(capture.text(), "one two three");
    }

    #[test]
    fn a_tail_is_the_end_or_everything() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
    }
}
