//! What the device asks of whoever serves the function. Knows no protocol.

use std::error::Error;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::pin::Look;
/// The region that is the configuration space.
pub const CONFIG_REGION: u8 = 7;

/// A kind of interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Irq {
    /// The pin.
    Intx,
    /// Message signalled.
    Msi,
    /// The same with a table.
    MsiX,
}

/// Why a server did not do what it was asked.
#[derive(Debug)]
pub enum ServerError {
    /// It said no, and can be asked again.
    Refused(Box<dyn Error + Send + Sync>),
    /// It cannot be used any more.
    Lost(Box<dyn Error + Send + Sync>),
}

/// Traffic with the server, since it was connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServerStats {
    /// Messages sent to it.
    pub messages: u64,
    /// Answers that were waited for.
    pub waits: u64,
    /// The longest wait.
    pub worst_wait: Duration,
}

/// Whoever serves a function. Called on vCPU threads, several at once, and on the control thread; every call ends
/// within the peer's deadline.
pub trait Server: Send + Sync {
    /// Reads all of `data` from a region. Waits for the answer.
    ///
    /// # Errors
    /// When the server refuses or fails.
    fn read(&self, region: u8, offset: u64, data: &mut [u8]) -> Result<(), ServerError>;

    /// Writes to a region. Waits for the answer.
    ///
    /// # Errors
    /// When the server refuses or fails.
    fn write(&self, region: u8, offset: u64, data: &[u8]) -> Result<(), ServerError>;

    /// Writes to a region, without an answer: before whatever is asked later, but nobody knows whether it was done.
    ///
    /// # Errors
    /// When the server is lost.
    fn post(&self, region: u8, offset: u64, data: &[u8]) -> Result<(), ServerError>;

    /// Gives the server the eventfds of all interrupts of one kind, the first for interrupt 0.
    ///
    /// # Errors
    /// When the server refuses or fails; it may have taken a part of them then.
    fn arm(&self, kind: Irq, calls: &[BorrowedFd<'_>]) -> Result<(), ServerError>;

    /// Takes all of them back.
    ///
    /// # Errors
    /// When the server refuses or fails.
    fn disarm(&self, kind: Irq) -> Result<(), ServerError>;

    /// The guest has served the pin's interrupt: raise it again if there is still a reason. Does not wait. A server that
    /// only says so has `look` told.
    ///
    /// # Errors
    /// When the server is lost.
    fn unmask_pin(&self, look: Look) -> Result<(), ServerError>;

    /// Resets the device; what was mapped and armed stays.
    ///
    /// # Errors
    /// When the server refuses or fails.
    fn reset(&self) -> Result<(), ServerError>;

    /// Ends the connection: whoever waits for an answer is told at once.
    fn shut_down(&self);

    /// What happened so far.
    fn stats(&self) -> ServerStats;
}
