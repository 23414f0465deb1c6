//! The deadline of a connection, its trace, the processes that may be its peer, and its counters.

use std::sync::Arc;
use std::time::Duration;

use super::socket::Admission;
use super::trace::Trace;

/// The deadline of one peer, the trace of its messages, and the users whose process it may be.
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
    /// `deadline` bounds each operation on the peer, however many messages the operation has and however
    /// slowly they come.
    pub fn new(deadline: Duration) -> Self {
        Self { deadline, trace: None, admission: Admission::default() }
    }

    /// Reports every message to `trace`.
    #[must_use]
    pub fn traced(mut self, trace: Arc<dyn Trace>) -> Self {
        self.trace = Some(trace);
        self
    }

    /// Sets the users whose process may own an abstract socket name that we connect to.
    #[must_use]
    pub fn admitting(mut self, admission: Admission) -> Self {
        self.admission = admission;
        self
    }

    pub(crate) fn admission(&self) -> Admission {
        self.admission
    }

    /// The limit of each operation.
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
    /// Messages sent, except for posted writes, which ask for no reply.
    pub sent: u64,
    /// Answers that were waited for and came, refusals included.
    pub answers: u64,
    /// Waits that failed: the deadline passed, the peer closed the connection, or its answer was malformed.
    pub failures: u64,
    /// The longest wait for an answer, failed waits included.
    pub worst_wait: Duration,
    /// The sum of all waits.
    pub total_wait: Duration,
}

impl Stats {
    pub(crate) fn waited(&mut self, took: Duration) {
        self.worst_wait = self.worst_wait.max(took);
        self.total_wait = self.total_wait.saturating_add(took);
    }
}
