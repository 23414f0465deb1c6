//! A vhost-user backend made with the crates `vhost-user-backend` and `vhost`, run on a thread of this
//! process.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vhost::vhost_user::Listener;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::scratch::Scratch;
use crate::wait;

/// A backend behind a socket; serves one machine. Ends when the machine has gone, or when dropped.
#[derive(Debug)]
pub struct Served {
    name: &'static str,
    scratch: Scratch,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    /// Serves `backend`, and waits until it listens.
    ///
    /// # Panics
    /// When the socket cannot be made.
    #[must_use]
    pub fn start<T>(name: &'static str, backend: Arc<T>) -> Self
    where
        T: VhostUserBackend<Bitmap = (), Vring = VringRwLock> + Send + Sync + 'static,
    {
        let scratch = Scratch::new();
        let path = scratch.path(name);
        let thread = thread::spawn(move || {
            let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
            let mut daemon = VhostUserDaemon::new(name.to_owned(), backend, memory).unwrap();
            let mut listener = Listener::new(&path, true).unwrap();
            daemon.start(&mut listener).unwrap();
            // The crate calls every end of a connection an error. The test has asserted before what matters.
            if let Err(error) = daemon.wait() {
                println!("{name}: {error}");
            }
        });
        let served = Self { name, scratch, thread: Some(thread) };
        wait::until(&format!("the {name} listens"), Duration::from_secs(10), || {
            is_listening(&served.socket()).then_some(())
        });
        served
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.scratch.path(self.name)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // The thread is in accept() when no machine came, and a connection ends that. Whether the thread
        // listens is not asked: the host's table of sockets may skip a socket while others come and go.
        drop(std::os::unix::net::UnixStream::connect(self.socket()));
        let Some(thread) = self.thread.take() else { return };
        // A backend without `exit_event` leaves a thread of the crate behind that waits for kicks.
        if wait::poll(Duration::from_secs(2), || thread.is_finished().then_some(())).is_none() {
            eprintln!("the thread of the {} does not end: has the backend an exit_event()?", self.name);
        } else if thread.join().is_err() {
            eprintln!("the thread of the {} panicked", self.name);
        }
    }
}

/// True when somebody listens on the unix socket `path`. The table of sockets is read, and no connection is
/// made: most backends take one connection.
///
/// # Panics
/// When the host has no `/proc/net/unix`.
#[must_use]
pub fn is_listening(path: &Path) -> bool {
    const ACCEPTS: u32 = 0x10000;
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    table.lines().any(|line| {
        let mut words = line.split_whitespace();
        let flags = words.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok()).unwrap_or(0);
        flags & ACCEPTS != 0 && words.nth(3).is_some_and(|name| Path::new(name) == path)
    })
}

/// The value of a mutex, also after a panic of another thread.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
