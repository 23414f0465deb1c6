//! A `vmm::Machine` in this process, as a backend author's own test has it.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm::config::{Config, Image, Serial};
use vmm::{Error, Handle, Machine, Outcome};

use crate::payload::{CommandLine, tiny_kernel};
use crate::wait;

/// The tiny kernel with a command line, in 32 MiB, and the memory that its console fills.
#[must_use]
pub fn tiny_machine(line: &CommandLine) -> (Config, Arc<Mutex<Vec<u8>>>) {
    let mut config = Config::new(Image::Bytes(Arc::from(tiny_kernel())));
    config.cmdline = Some(line.to_string());
    config.memory.size = 32 << 20;
    let (serial, console) = Serial::buffer();
    config.serial = serial;
    (config, console)
}

/// A machine on a thread of its own. Ended when dropped.
#[derive(Debug)]
pub struct InProcess {
    thread: Option<JoinHandle<Result<Outcome, Error>>>,
    handle: Handle,
    console: Arc<Mutex<Vec<u8>>>,
}

impl InProcess {
    /// Builds and starts it. `console` is what `config.serial` writes to.
    ///
    /// # Errors
    /// Those of building the machine.
    pub fn start(config: Config, console: Arc<Mutex<Vec<u8>>>) -> Result<Self, Error> {
        let machine = Machine::build(config)?;
        let handle = machine.handle();
        let thread = thread::spawn(move || machine.run());
        Ok(Self { thread: Some(thread), handle, console })
    }

    /// The console so far.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.console.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits for text on the console.
    ///
    /// # Panics
    /// When it does not come.
    pub fn expect(&self, wanted: &str) {
        let found = wait::poll(crate::launch::STEP, || self.console().contains(wanted).then_some(()));
        assert!(found.is_some(), "{wanted:?} did not come; the console:\n{}", self.console());
    }

    /// Asks it to end, as Ctrl-A x does.
    pub fn quit(&self) {
        self.handle.quit();
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Those of running the machine.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn end(mut self, limit: Duration) -> Result<Outcome, Error> {
        let thread = self.thread.take().expect("ends once");
        let ended = wait::poll(limit, || thread.is_finished().then_some(()));
        assert!(ended.is_some(), "the machine did not end; the console:\n{}", self.console());
        thread.join().unwrap()
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.handle.quit();
        let Some(thread) = self.thread.take() else { return };
        if wait::poll(crate::launch::STEP, || thread.is_finished().then_some(())).is_none() {
            eprintln!("a machine did not end when asked to; the console:\n{}", self.console());
        }
    }
}
