//! The interrupts of one function that are behind message vectors, for MSI and MSI-X alike. A `Call` has one
//! route while its vector is live, and no route while the vector is masked. A signal that comes meanwhile
//! stays in the eventfd. Called under the function's lock; must never wait.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use transport::vhost_user::vring::Call;

use crate::ports::{Guard, Interrupts, PortError, Route};

/// Identifies a connected `Call`, for moving or removing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(u64);

struct Connection {
    /// `None` if the call is connected to no vector; it is then never delivered.
    vector: Option<u16>,
    call: Arc<Call>,
    live: Option<(Route, Guard)>,
}

impl Connection {
    fn lead(&mut self, to: Option<Route>, interrupts: &dyn Interrupts) -> Result<(), PortError> {
        if self.live.as_ref().map(|(route, _)| *route) == to {
            return Ok(());
        }
        // The old route is removed first, because an eventfd has one route at a time.
        self.live = None;
        if let Some(route) = to {
            self.live = Some((route, interrupts.attach(self.call.as_fd(), route)?));
        }
        Ok(())
    }

    /// Whether the eventfd holds a signal that was not delivered.
    fn is_pending(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::from_borrowed_fd(self.call.as_fd(), PollFlags::IN)];
        self.live.is_none() && poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

/// The connections of one function.
pub(super) struct Vectors {
    interrupts: Arc<dyn Interrupts>,
    next: u64,
    connections: BTreeMap<ConnectionId, Connection>,
}

impl Vectors {
    pub(super) fn new(interrupts: Arc<dyn Interrupts>) -> Self {
        Self { interrupts, next: 0, connections: BTreeMap::new() }
    }

    pub(super) fn connect(
        &mut self,
        vector: Option<u16>,
        call: Arc<Call>,
        route: Option<Route>,
    ) -> Result<ConnectionId, PortError> {
        let mut connection = Connection { vector, call, live: None };
        connection.lead(route, self.interrupts.as_ref())?;
        let id = ConnectionId(self.next);
        self.next += 1;
        self.connections.insert(id, connection);
        Ok(id)
    }

    pub(super) fn disconnect(&mut self, id: ConnectionId) {
        self.connections.remove(&id);
    }

    pub(super) fn retarget(
        &mut self,
        id: ConnectionId,
        vector: Option<u16>,
        route: Option<Route>,
    ) -> Result<(), PortError> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        connection.vector = vector;
        connection.lead(route, self.interrupts.as_ref())
    }

    /// Gives every connection the `route` of its vector; `None` masks the vector. Returns the first refusal.
    /// The other connections get their routes all the same, and signals of the refused one stay pending.
    pub(super) fn sync(&mut self, route: impl Fn(u16) -> Option<Route>) -> Result<(), PortError> {
        let mut result = Ok(());
        for connection in self.connections.values_mut() {
            let to = connection.vector.and_then(&route);
            result = result.and(connection.lead(to, self.interrupts.as_ref()));
        }
        result
    }

    /// Like [`Vectors::sync`], for the connections of one vector.
    pub(super) fn sync_one(&mut self, vector: u16, route: Option<Route>) -> Result<(), PortError> {
        let mut result = Ok(());
        for connection in self.connections.values_mut().filter(|c| c.vector == Some(vector)) {
            result = result.and(connection.lead(route, self.interrupts.as_ref()));
        }
        result
    }

    /// Whether a signal of `vector` waits for the vector to be unmasked.
    pub(super) fn is_pending(&self, vector: u16) -> bool {
        self.connections.values().any(|c| c.vector == Some(vector) && c.is_pending())
    }
}
