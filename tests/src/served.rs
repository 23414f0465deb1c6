//! A vhost-user backend made with the crates `vhost-user-backend` and `vhost`, run on a thread of this process. Knows how one
//! starts and ends, not what it serves: that is in [`crate::disk`] and [`crate::gadget`].

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vhost::vhost_user::Listener;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::daemon::is_listening;
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
            // Every way of going ends in an error of this crate; what matters was asserted by then.
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
        // A machine that never came leaves the thread in accept(). Whether it is there is not asked: the host's table of
        // sockets may skip one while others come and go, and this waits for ever then.
        drop(std::os::unix::net::UnixStream::connect(self.socket()));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("the thread of the {} panicked", self.name);
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
