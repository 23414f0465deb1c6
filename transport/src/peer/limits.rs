//! What bounds a connection, who watches it, and what it counted.

use std::sync::Arc;
use std::time::Duration;

use super::socket::Admission;
use super::trace::Trace;

/// The deadline of one peer, who watches its messages, and whose process it may be.
#[derive(Clone)]
pub struct Limits {
    deadline: Duration,
    trace: Option<Arc<dyn Trace>>,
    admission: Admission,
}

impl Default for Limits {
    /// Two seconds, no trace.
    fn default() -> Self {
        Self::new(Duration::from_millis(2000))
    }
}

impl Limits {
    /// `deadline` bounds each operation on the peer, however many messages it takes and however slowly they come.
    pub fn new(deadline: Duration) -> Self {
        Self { deadline, trace: None, admission: Admission::default() }
    }

    /// Reports every message to `trace`.
    #[must_use]
    pub fn traced(mut self, trace: Arc<dyn Trace>) -> Self {
        self.trace = Some(trace);
        self
    }

    /// Whose an abstract name may be that is connected to.
    #[must_use]
    pub fn admitting(mut self, admission: Admission) -> Self {
        self.admission = admission;
        self
    }

    pub(crate) fn admission(&self) -> Admission {
        self.admission
    }

    /// The bound of each operation.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    pub(crate) fn trace(&self) -> Option<&Arc<dyn Trace>> {
        self.trace.as_ref()
    }
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limits").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

/// Counters of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Messages sent, but for those that nothing answers by their kind (posted writes).
    pub sent: u64,
    /// Answers that were waited for and came, refusals included.
    pub answers: u64,
    /// Waits that failed: a deadline passed, the peer hung up, or its answer was malformed.
    pub failures: u64,
    /// The longest wait for an answer, whether it came or not.
    pub worst_wait: Duration,
    /// All waits together.
    pub total_wait: Duration,
}

impl Stats {
    pub(crate) fn waited(&mut self, took: Duration) {
        self.worst_wait = self.worst_wait.max(took);
        self.total_wait = self.total_wait.saturating_add(took);
    }
}
