//! Errors for the user: one sentence, its causes, a hint, and the exit code.
//!
//! The sentence says what outboard was doing. It must never repeat its cause. [`Error::report`] is the only
//! place that prints a chain of causes.

use std::error::Error as StdError;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use rustix::io::Errno;
use vm_memory::mmap::MmapRegionError;

/// The party that has to act. It decides the exit code of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A mistake in outboard, or an unexpected failure of the system below it.
    Internal,
    /// The command line or the configuration file.
    Usage,
    /// This host cannot run the machine.
    Host,
    /// A vhost-user backend or a vfio-user server.
    Peer,
    /// The guest crashed.
    Guest,
}

impl Fault {
    /// The exit code of the process.
    pub const fn exit_code(self) -> u8 {
        match self {
            Fault::Internal => 1,
            Fault::Usage => 2,
            Fault::Host => 3,
            Fault::Peer => 4,
            Fault::Guest => 5,
        }
    }
}

type Source = Box<dyn StdError + Send + Sync>;

/// One failure: what outboard was doing, why that failed, and what may help.
#[derive(Debug)]
pub struct Error {
    fault: Fault,
    doing: String,
    source: Option<Source>,
    hint: Option<String>,
}

impl Error {
    /// `doing` is a clause such as `cannot start device disk0`, without a final stop.
    pub fn new(fault: Fault, doing: impl Into<String>) -> Self {
        Error { fault, doing: doing.into(), source: None, hint: None }
    }

    /// A mistake in the command line or the configuration.
    pub fn usage(doing: impl Into<String>) -> Self {
        Self::new(Fault::Usage, doing)
    }

    /// The socket at `path`, on which we listen for `whom`, cannot be made.
    pub(crate) fn listening(whom: &str, path: &Path, error: io::Error) -> Self {
        let hint = match error.kind() {
            ErrorKind::AddrInUse => "the path exists: is another machine using it? if not, remove it",
            ErrorKind::PermissionDenied => "give a path in a directory that this user may write to",
            _ => "give a path in a directory that exists",
        };
        Self::usage(format!("cannot listen for {whom} on {}", path.display())).because(error).hint(hint)
    }

    /// Something that this host lacks.
    pub fn host(doing: impl Into<String>) -> Self {
        Self::new(Fault::Host, doing)
    }

    /// A failure that the user cannot repair.
    pub fn internal(doing: impl Into<String>) -> Self {
        Self::new(Fault::Internal, doing)
    }

    /// Adds the cause, printed after `because:`. If the cause is a limit of this host, the fault becomes
    /// [`Fault::Host`], and the hint is the advice about that limit.
    pub fn because(mut self, source: impl Into<Source>) -> Self {
        let source = source.into();
        if let Some(hint) = exceeded(source.as_ref()) {
            self.fault = Fault::Host;
            self.hint = Some(hint.to_owned());
        }
        self.source = Some(source);
        self
    }

    /// Adds advice for the user, printed after `hint:`. A hint that is already there stays.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert(hint.into());
        self
    }

    /// Adds the advice, if there is any.
    pub fn hints(self, hint: Option<impl Into<String>>) -> Self {
        hint.into_iter().fold(self, |error, hint| error.hint(hint))
    }

    /// The party that has to act.
    pub fn fault(&self) -> Fault {
        self.fault
    }

    /// Writes the sentence, the causes and the hint. This is the only place that prints a chain of causes.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn report(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "outboard: {}", self.doing)?;
        let mut cause = self.source();
        while let Some(error) = cause {
            writeln!(out, "  because: {error}")?;
            cause = error.source();
        }
        if let Some(hint) = &self.hint {
            writeln!(out, "  hint: {hint}")?;
        }
        Ok(())
    }
}

/// Advice about a limit of this host, if `error` or one of its causes is such a limit.
fn exceeded(error: &(dyn StdError + 'static)) -> Option<&'static str> {
    // An io::Error that was made from another error does not give that error as its source; it is asked for
    // separately.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    let wrapped = wrapped.map(|error| error as &(dyn StdError + 'static));
    if let Some(deeper) = wrapped.or(error.source()).and_then(exceeded) {
        return Some(deeper);
    }
    let mapping = match error.downcast_ref() {
        Some(MmapRegionError::Mmap(error)) => Some(error),
        _ => None,
    };
    let io = error.downcast_ref().or(mapping).and_then(std::io::Error::raw_os_error);
    let errno = || error.downcast_ref::<Errno>().map(|errno| errno.raw_os_error());
    let system = || error.downcast_ref::<kvm_ioctls::Error>().map(|error| error.errno());
    match Errno::from_raw_os_error(io.or_else(errno).or_else(system)?) {
        Errno::MFILE => Some("allow more open files: `ulimit -n`, or LimitNOFILE= of systemd"),
        Errno::NFILE => Some("this host has no open file left: see /proc/sys/fs/file-max"),
        Errno::FBIG => {
            Some("allow larger files, as guest memory counts as one: `ulimit -f`, or LimitFSIZE= of systemd")
        }
        Errno::NOMEM => Some("give less --memory, or allow this process more: see `ulimit -v`"),
        _ => None,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.doing)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_the_host_is_the_hosts_fault() {
        #[derive(Debug, thiserror::Error)]
        #[error("no answer")]
        struct Deep(#[source] std::io::Error);
        for (code, word) in [(24, "ulimit -n"), (23, "file-max"), (27, "LimitFSIZE"), (12, "--memory")] {
            let deep = Deep(std::io::Error::from_raw_os_error(code));
            let error = Error::new(Fault::Peer, "cannot start device a").because(deep).hint("another");
            assert_eq!(error.fault(), Fault::Host);
            assert!(error.hint.as_ref().is_some_and(|hint| hint.contains(word)), "{error:?}");
        }
    }

    #[test]
    fn report_prints_sentence_causes_and_hint_in_that_order() {
        let io = std::io::Error::from_raw_os_error(2);
        let error = Error::usage("cannot open kernel /k").because(io).hint("pass an existing file");
        let mut out = Vec::new();
        error.report(&mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "outboard: cannot open kernel /k\n  because: No such file or directory (os error 2)\n  hint: pass an existing file\n"
        );
        assert_eq!(error.fault().exit_code(), 2);
    }
}
