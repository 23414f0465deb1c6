//! The command line: turns arguments into a [`Config`], runs the machine, and prints errors.
//!
//! Everything else is in the library; see [`crate::Machine`].

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::config::{
    Config, Image, Memory, OnReset, Serial, load_toml, parse_device_type, parse_memory, parse_serial,
    parse_vfio_user, parse_vhost_user,
};
use crate::console::outlet::Outlet;
use crate::console::terminal;
use crate::error::{Error, Fault};
use crate::handle::End;
use crate::life::signals::{Signals, survive_file_size_limit};
use crate::machine::{Machine, Outcome};
use crate::tools::trace::Tracer;
use crate::tools::{check, probe};

const EXIT_CODES: &str = "Exit codes: 0 the guest shut down (or Ctrl-A x) · 1 internal error · 2 usage or \
configuration · 3 this host cannot run it · 4 a peer failed · 5 the guest crashed · 128+N ended by signal N";

/// A minimal KVM virtual machine monitor whose devices all live in other processes.
#[derive(Debug, Parser)]
#[command(name = "outboard", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a guest
    Run(Box<Run>),
    /// Say what this host can boot
    Check {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what a peer offers
    Probe(Probe),
    /// Print a completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// What `outboard probe` takes.
#[derive(Debug, Args)]
struct Probe {
    /// What the peer speaks
    protocol: Protocol,
    /// The path of its socket, or @NAME of an abstract one
    socket: PathBuf,
    /// What device a vhost-user backend serves, as `run` calls it: some die when asked for more configuration than it has
    #[arg(long = "type", value_name = "TYPE")]
    device: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// How long the peer may take over one request, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    deadline: u64,
    /// Write every message to a file, or to standard error for -
    #[arg(long, value_name = "FILE|-")]
    trace: Option<PathBuf>,
}

/// What `outboard run` takes; a TOML file given by `--config` may say the same.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
struct Run {
    /// Kernel image: bzImage, or ELF (vmlinux) with or without a PVH note
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Kernel command line [default: "console=ttyS0 panic=-1 pci=off 8250.nr_uarts=1
    /// cryptomgr.notests"]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Guest RAM, a multiple of 2M; hugepages=2M or 1G takes reserved huge pages, dump=on puts it into core dumps [default: 256M]
    #[arg(long, value_name = "SIZE[,KEY=VALUE]")]
    memory: Option<String>,
    /// Number of vCPUs, 1 to 255 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    cpus: Option<u8>,
    /// A virtio device served by a vhost-user backend (may be given again). A comma inside a value is written twice. Keys: id=NAME,
    /// transport=mmio|pci, queues=N, queue-size=N, config-size=BYTES, tag=NAME (fs), deadline=MS, features=-NAME+NAME, server=on,
    /// iommu=identity (the backend is told what the driver's addresses mean), mtu=N and mac=ADDRESS (net), gpu-socket=PATH,
    /// reconnect=SECONDS; socket=fd=N takes an inherited descriptor
    #[arg(long, value_name = "TYPE,socket=PATH[,KEY=VALUE]")]
    vhost_user: Vec<OsString>,
    /// A PCI device served by a vfio-user server (may be given again). Keys: id=NAME, deadline=MS,
    /// posted-writes=on|off (whether a write to a BAR waits for the server; by default it does where
    /// memory of the BAR is mapped into the guest, and with old libvfio-user); socket=fd=N takes an inherited descriptor
    #[arg(long, value_name = "socket=PATH[,KEY=VALUE]")]
    vfio_user: Vec<OsString>,
    /// Where the serial console goes: stdio, null, file=PATH or socket=PATH (we listen) [default: stdio]
    #[arg(long, value_name = "WHERE")]
    serial: Option<OsString>,
    /// Write statistics as JSON when the machine ends; - is standard output
    #[arg(long, value_name = "PATH|-")]
    stats: Option<PathBuf>,
    /// Write every message exchanged with a peer, a line each, to a file or to standard error for -
    #[arg(long, value_name = "FILE|-")]
    trace: Option<PathBuf>,
    /// End, as at a power-off, when the guest resets
    #[arg(long)]
    no_reboot: bool,
    /// How the guest learns of its devices [default: acpi]
    #[arg(long, value_name = "HOW")]
    discovery: Option<Discovery>,
    /// Read what is not given here from a TOML file with the same names
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Say more on standard error; twice for debugging, three times for every message
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Protocol {
    /// A vhost-user backend
    VhostUser,
    /// A vfio-user server
    VfioUser,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Discovery {
    /// ACPI tables, which stock kernels understand
    Acpi,
    /// virtio_mmio.device= on the command line, for kernels without ACPI
    Cmdline,
}

/// The machine's configuration, and the options of `run` that are not part of it.
struct Job {
    config: Config,
    stats: Option<PathBuf>,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.kind() == ErrorKind::InvalidUtf8 => {
            let odd = std::env::args_os().find(|argument| argument.to_str().is_none()).unwrap_or_default();
            let error = Error::usage(format!("the argument `{}` is not valid UTF-8", odd.display())).hint(
                "paths and devices may be any bytes; names, numbers and the kernel's command line are UTF-8",
            );
            complain(&error, "");
            return ExitCode::from(Fault::Usage.exit_code());
        }
        Err(error) => {
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            return match error.print() {
                Ok(()) => ExitCode::from(code),
                Err(_) => ExitCode::from(Fault::Internal.exit_code()),
            };
        }
    };
    let done = match cli.command {
        Command::Run(options) => run(*options),
        Command::Check { json } => check::command(json),
        Command::Probe(options) => probe(&options),
        Command::Completions { shell } => completions(shell),
    };
    let code = done.unwrap_or_else(|error| {
        terminal::restore();
        complain(&error, "");
        ExitCode::from(error.fault().exit_code())
    });
    crate::logging::finish();
    code
}

/// Prints an error chain, then `more`. A closed standard error is ignored.
fn complain(error: &Error, more: &str) {
    let mut text = Vec::new();
    if error.report(&mut text).is_ok() {
        crate::logging::write(&(String::from_utf8_lossy(&text) + more));
    }
}

fn completions(shell: clap_complete::Shell) -> Result<ExitCode, Error> {
    // The script goes into memory first, because printing to a closed pipe would panic.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "outboard", &mut script);
    io::stdout()
        .write_all(&script)
        .map_err(|error| Error::internal("cannot print the completion script").because(error))?;
    Ok(ExitCode::SUCCESS)
}

fn probe(options: &Probe) -> Result<ExitCode, Error> {
    let device = options.device.as_deref().map(parse_device_type).transpose()?;
    let socket = probe::socket_path(&options.socket)?;
    let tracer = options.trace.as_deref().map(Tracer::open).transpose()?;
    let deadline = Duration::from_millis(options.deadline);
    match options.protocol {
        Protocol::VhostUser => {
            let limits = transport::peer::Limits::new(deadline);
            let limits = tracer.into_iter().fold(limits, |limits, tracer| limits.traced(tracer));
            probe::vhost_user::command(socket, &limits, device, options.json)
        }
        Protocol::VfioUser if device.is_some() => {
            Err(Error::usage("--type is not for vfio-user servers").hint("they say themselves what they are"))
        }
        Protocol::VfioUser => {
            let limits = transport::peer::Limits::new(deadline);
            let limits = tracer.into_iter().fold(limits, |limits, tracer| limits.traced(tracer));
            probe::vfio_user::command(socket, &limits, options.json)
        }
    }
}

fn run(options: Run) -> Result<ExitCode, Error> {
    crate::logging::start(options.verbose);
    terminal::restore_on_panic();
    survive_file_size_limit();
    crate::host::descriptors::allow_many();
    let Job { config, stats } = options.job()?;
    // The file is opened before the machine is built, so that a path that cannot be written is reported now
    // and not at the end.
    let mut sink = stats.map(StatsSink::open).transpose()?;
    let signals = Signals::watch()?;
    let mut machine = signals.during(|| Machine::build(config))?;
    machine.serve_signals(signals);
    crate::host::mapping::release_text();
    let Outcome { end, stats } = machine.run()?;
    if let Some(sink) = sink.as_mut() {
        sink.write(&stats)?;
    }
    match end {
        End::PowerOff | End::Reset | End::Quit => Ok(ExitCode::SUCCESS),
        End::Signal(signal) => Ok(ExitCode::from(128_u8.saturating_add(u8::try_from(signal).unwrap_or(0)))),
        End::Crash(report) => {
            let (what, registers) = report.split_once('\n').unwrap_or((&report, ""));
            let crashed = Error::new(Fault::Guest, "the guest crashed").because(what.to_owned());
            complain(&crashed, registers);
            Ok(ExitCode::from(Fault::Guest.exit_code()))
        }
        End::Panicked => {
            let panicked =
                Error::new(Fault::Guest, "the guest's kernel panicked").hint("its console says why");
            complain(&panicked, "");
            Ok(ExitCode::from(Fault::Guest.exit_code()))
        }
    }
}

impl Run {
    /// Combines the command line with the configuration file. The command line has priority.
    fn job(self) -> Result<Job, Error> {
        let file = self.config.as_deref().map(load_toml).transpose()?.unwrap_or_default();
        let kernel = self.kernel.or(file.kernel).ok_or_else(|| {
            Error::usage("no kernel was given").hint("pass --kernel FILE, a bzImage or an ELF vmlinux")
        })?;
        let mut config = Config::new(Image::Path(kernel));
        config.initramfs = self.initramfs.or(file.initramfs).map(Image::Path);
        config.cmdline = self.cmdline.or(file.cmdline);
        config.memory = match self.memory.or(file.memory) {
            Some(text) => parse_memory(&text)?,
            None => Memory::default(),
        };
        config.cpus = self.cpus.or(file.cpus).unwrap_or(1);
        for text in file.vhost_user.into_iter().map(OsString::from).chain(self.vhost_user) {
            config.vhost_user.push(parse_vhost_user(text)?);
        }
        for text in file.vfio_user.into_iter().map(OsString::from).chain(self.vfio_user) {
            config.vfio_user.push(parse_vfio_user(text)?);
        }
        config.serial = match self.serial.or(file.serial.map(OsString::from)) {
            Some(text) => parse_serial(text)?,
            None => Serial::Stdio,
        };
        config.on_reset = if self.no_reboot || file.no_reboot { OnReset::Exit } else { OnReset::Reboot };
        let from_file = file.discovery.map(|name| {
            Discovery::from_str(&name, false).map_err(|_| {
                Error::usage(format!("discovery cannot be `{name}`")).hint("write acpi or cmdline")
            })
        });
        config.discovery = match self.discovery.or(from_file.transpose()?) {
            None | Some(Discovery::Acpi) => arch::platform::Discovery::Acpi,
            Some(Discovery::Cmdline) => arch::platform::Discovery::Cmdline,
        };
        config.settle()?;
        if let Some(target) = self.trace.or(file.trace) {
            let tracer = Tracer::open(&target)?;
            config.trace = Some(tracer);
        }
        Ok(Job { config, stats: self.stats.or(file.stats) })
    }
}

/// The destination of `--stats`.
enum StatsSink {
    Stdout,
    File(File, PathBuf),
}

impl StatsSink {
    fn open(path: PathBuf) -> Result<Self, Error> {
        if path.as_os_str() == "-" {
            return Ok(StatsSink::Stdout);
        }
        let file = File::create(&path).map_err(|error| {
            Error::usage(format!("cannot write statistics to {}", path.display())).because(error)
        })?;
        Ok(StatsSink::File(file, path))
    }

    fn write(&mut self, stats: &crate::stats::Stats) -> Result<(), Error> {
        let cannot = |error| Error::internal("cannot write the statistics").because(error);
        let mut text = serde_json::to_string_pretty(stats).map_err(|error| cannot(io::Error::from(error)))?;
        text.push('\n');
        match self {
            StatsSink::Stdout => {
                let mut outlet = Outlet::stream(io::stdout().as_fd()).map_err(cannot)?;
                outlet.push(text.as_bytes()).map_err(cannot)?;
                let silence = Duration::from_secs(1);
                outlet.drain(silence, 10 * silence).map_err(cannot)?;
                match outlet.waiting() {
                    0 => Ok(()),
                    rest => Err(Error::internal("cannot write the statistics")
                        .because(format!("nobody reads standard output: {rest} bytes are left"))),
                }
            }
            StatsSink::File(file, path) => file.write_all(text.as_bytes()).map_err(|error| {
                Error::internal(format!("cannot write statistics to {}", path.display())).because(error)
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(arguments: &[&str]) -> Result<Job, Error> {
        let cli = Cli::try_parse_from([&["outboard", "run"], arguments].concat()).unwrap();
        let Command::Run(options) = cli.command else { panic!("not run") };
        options.job()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_reach_the_configuration() {
        let job = job(&[
            "--kernel",
            "/k",
            "--memory",
            "512M",
            "--cpus",
            "2",
            "--no-reboot",
            "--vhost-user",
            "blk,socket=/s",
            "--stats",
            "-",
        ])
        .unwrap();
        assert_eq!((job.config.memory.size, job.config.cpus), (512 << 20, 2));
        assert_eq!(job.config.on_reset, OnReset::Exit);
        assert_eq!(job.config.vhost_user.len(), 1);
        assert_eq!(job.stats.as_deref(), Some(std::path::Path::new("-")));
    }

    #[test]
    fn flags_win_over_the_configuration_file_and_devices_add_up() {
        let path = std::env::temp_dir().join(format!("outboard-cli-{}.toml", std::process::id()));
        std::fs::write(&path, "kernel = '/a'\ncpus = 3\nmemory = '64M'\nvhost-user = ['blk,socket=/1']\n")
            .unwrap();
        let file = path.to_str().unwrap();
        let job = job(&["--config", file, "--cpus", "2", "--vhost-user", "rng,socket=/2"]).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!((job.config.cpus, job.config.memory.size), (2, 64 << 20));
        assert_eq!(job.config.vhost_user.len(), 2);
    }

    #[test]
    fn a_device_of_the_configuration_file_may_be_a_table() {
        let path = std::env::temp_dir().join(format!("outboard-table-{}.toml", std::process::id()));
        let device = "{ type = 'blk', socket = '/run/a,b', queues = 2, server = true, id = 'disk' }";
        std::fs::write(&path, format!("kernel = '/a'\nvhost-user = [{device}, 'net,socket=/n']\nvfio-user = [{{ socket = '/v,' }}]\n")).unwrap();
        let config = job(&["--config", path.to_str().unwrap()]).map(|job| job.config);
        std::fs::remove_file(&path).unwrap();
        let config = config.unwrap();
        let disk = &config.vhost_user[0];
        assert_eq!(
            (disk.socket.to_string(), disk.queues, disk.id.as_deref()),
            ("/run/a,b".to_owned(), Some(2), Some("disk"))
        );
        assert_eq!((config.vhost_user.len(), config.vfio_user[0].socket.to_string()), (2, "/v,".to_owned()));
    }

    #[test]
    fn the_examples_are_configurations() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/examples");
        let devices = |name: &str| {
            let config = job(&["--config", &format!("{folder}/{name}"), "--trace", "-"]).unwrap().config;
            (config.vhost_user.len(), config.vfio_user.len())
        };
        assert_eq!((devices("virtio.toml"), devices("nvme.toml")), ((4, 0), (0, 1)));
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 2, "each is tried here");
    }

    #[test]
    fn unknown_names_are_refused_with_the_exit_code_for_usage() {
        for arguments in [&["--control", "/c"][..], &["--incoming", "unix:/m"]] {
            let error = Cli::try_parse_from([&["outboard", "run", "--kernel", "/k"], arguments].concat())
                .unwrap_err();
            assert_eq!(error.exit_code(), 2);
        }
        let path = std::env::temp_dir().join(format!("outboard-cli-bad-{}.toml", std::process::id()));
        std::fs::write(&path, "kernle = '/a'\n").unwrap();
        let error = job(&["--config", path.to_str().unwrap()]).map(|_| ()).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(error.fault().exit_code(), 2);
    }

    #[test]
    fn a_missing_kernel_is_a_usage_error_with_a_hint() {
        let error = job(&[]).map(|_| ()).unwrap_err();
        let mut out = Vec::new();
        error.report(&mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("hint: pass --kernel"));
    }
}
