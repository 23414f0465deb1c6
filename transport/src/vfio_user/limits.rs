//! What bounds a connection, who watches it, and what it counted.

use std::sync::Arc;
use std::time::Duration;

use super::dma::{DmaMemory, DmaRefusal, DmaServed};
use super::trace::Trace;

/// Limits of one server, who watches its messages, and how its DMA by message reaches guest memory.
#[derive(Clone)]
pub struct Limits {
    deadline: Duration,
    trace: Option<Arc<dyn Trace>>,
    memory: Option<Arc<dyn DmaMemory>>,
}

impl Default for Limits {
    /// Two seconds, no trace, guest memory through its files.
    fn default() -> Self {
        Self::new(Duration::from_millis(2000))
    }
}

impl Limits {
    /// `deadline` bounds each operation on the server, however many messages it takes.
    pub fn new(deadline: Duration) -> Self {
        Self { deadline, trace: None, memory: None }
    }

    /// Reports every message to `trace`.
    #[must_use]
    pub fn traced(mut self, trace: Arc<dyn Trace>) -> Self {
        self.trace = Some(trace);
        self
    }

    /// Reaches guest memory through `memory` when the server asks for it by message, instead of through its files
    /// (which cannot be written that way when they are made of huge pages).
    #[must_use]
    pub fn with_memory(mut self, memory: Arc<dyn DmaMemory>) -> Self {
        self.memory = Some(memory);
        self
    }

    /// The bound of each operation.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    pub(super) fn trace(&self) -> Option<&Arc<dyn Trace>> {
        self.trace.as_ref()
    }

    pub(super) fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    pub(super) fn memory(&self) -> Option<Arc<dyn DmaMemory>> {
        self.memory.clone()
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
    /// Commands sent that want a reply.
    pub sent: u64,
    /// Messages sent that want none (posted writes).
    pub posted: u64,
    /// Replies that were waited for and came, refusals included.
    pub answers: u64,
    /// Replies that said no.
    pub refusals: u64,
    /// Waits that failed: a deadline passed, the server hung up, or its reply was malformed.
    pub failures: u64,
    /// Replies that came after their deadline.
    pub late: u64,
    /// The longest wait: from the beginning of the wait until the reply was whole, or given up.
    pub worst_wait: Duration,
    /// All waits together.
    pub total_wait: Duration,
    /// DMA reads that the server asked for by message.
    pub dma_reads: u64,
    /// DMA writes that the server asked for by message.
    pub dma_writes: u64,
    /// Bytes of both.
    pub dma_bytes: u64,
    /// Commands of the server that were refused.
    pub server_refusals: u64,
}

impl Stats {
    pub(super) fn count_dma(&mut self, outcome: &Result<DmaServed, DmaRefusal>) {
        let (counter, bytes) = match outcome {
            Ok(DmaServed::Read(reply)) => (&mut self.dma_reads, reply.len().saturating_sub(16)),
            Ok(DmaServed::Written(_, bytes)) => (&mut self.dma_writes, *bytes),
            Err(_) => (&mut self.server_refusals, 0),
        };
        *counter = counter.saturating_add(1);
        self.dma_bytes = self.dma_bytes.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }
}
