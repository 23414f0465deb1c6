//! Open vSwitch with DPDK: its database, and a daemon that can be killed and started again. One bridge with
//! two ports of type `dpdkvhostuserclient`: the switch connects to whoever listens on their paths, once a
//! second.
//!
//! Knows how to run it, not who is at its ports. Everything of it is in one folder: no tap devices (its
//! `dummy` datapath is that of DPDK's ports without them, as in its own tests), no huge pages, no files and
//! no syslog of the system's. The tests of the crate `transport` take this file as it is: nothing but `std`
//! here.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Its programs, as `tests/backends/fetch` brings them.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `ovs-vswitchd`
    pub daemon: PathBuf,
    /// `ovsdb-server`
    pub database: PathBuf,
    /// `ovs-vsctl`
    pub control: PathBuf,
    /// A database in which nothing is.
    pub empty: PathBuf,
    /// DPDK's driver for pools of buffers.
    pub ring: PathBuf,
}

impl Programs {
    /// All of them, when `find` knows each by its name.
    pub fn find(find: impl Fn(&str) -> Option<PathBuf>) -> Option<Self> {
        Some(Self {
            daemon: find("ovs-vswitchd")?,
            database: find("ovsdb-server")?,
            control: find("ovs-vsctl")?,
            empty: find("ovs-empty")?,
            ring: find("dpdk-mempool-ring")?,
        })
    }
}

/// A switch and its database. Both are killed when it is dropped; a test that panics meanwhile prints the end
/// of its log.
#[derive(Debug)]
pub struct Switch {
    programs: Programs,
    folder: PathBuf,
    database: Child,
    daemon: Option<Child>,
}

impl Switch {
    /// One whose files are in `folder`, set up and not started. `options` are `other_config` of its database.
    ///
    /// # Panics
    /// When its programs cannot be started, or do not take what they are told.
    #[must_use]
    pub fn new(programs: Programs, folder: &Path, options: &[&str]) -> Self {
        let (rows, socket) = (folder.join("rows"), folder.join("database"));
        fs::copy(&programs.empty, &rows).unwrap();
        let database = Self::command(&programs, &programs.database, folder)
            .arg(rows)
            .arg(format!("--remote=punix:{}", socket.display()))
            .arg(format!("--unixctl={}", folder.join("database.control").display()))
            .arg("--no-chdir")
            .spawn()
            .unwrap();
        let switch = Self { programs, folder: folder.to_owned(), database, daemon: None };
        let driver = switch.programs.ring.file_name().unwrap().to_str().unwrap();
        // Without --legacy-mem the switch adds --in-memory, which --no-huge contradicts. The thread that
        // looks at the ports rests, up to half a millisecond, while nothing comes. Buffers for all ports
        // together would be 700 MB.
        let mut arguments = words(
            "set Open_vSwitch . other_config:dpdk-init=true other_config:pmd-maxsleep=500 \
                                   other_config:per-port-memory=true",
        );
        arguments.push(format!(
            "other_config:dpdk-extra=--no-huge --legacy-mem -m 512 --no-pci --no-shconf --no-telemetry -d {driver}"
        ));
        arguments.extend(options.iter().map(|option| format!("other_config:{option}")));
        arguments.extend(words("-- add-br bridge -- set bridge bridge datapath_type=dummy"));
        for port in [0, 1] {
            let path = switch.port(port);
            arguments.extend(words(&format!(
                "-- add-port bridge port{port} -- set interface port{port} type=dpdkvhostuserclient \
                 options:vhost-server-path={}",
                path.display()
            )));
        }
        switch.control(&arguments);
        switch
    }

    fn command(programs: &Programs, program: &Path, folder: &Path) -> Command {
        let mut command = Command::new(program);
        let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
        command
            .env("LD_LIBRARY_PATH", programs.ring.parent().unwrap())
            .env("OVS_RUNDIR", folder)
            .env("OVS_LOGDIR", folder)
            .env("OVS_SYSCONFDIR", folder)
            .env("RUNTIME_DIRECTORY", folder)
            .args(["-vsyslog:off", "-vconsole:info"])
            .stdin(Stdio::null())
            .stdout(Stdio::from(log.try_clone().unwrap()))
            .stderr(Stdio::from(log));
        command
    }

    /// Has `ovs-vsctl` change the database.
    fn control(&self, arguments: &[String]) {
        let status = Self::command(&self.programs, &self.programs.control, &self.folder)
            .arg(format!("--db=unix:{}", self.folder.join("database").display()))
            .args(["--retry", "--timeout=60", "--no-wait"])
            .args(arguments)
            .status()
            .unwrap();
        assert!(status.success(), "ovs-vsctl: {status}\n{}", self.log());
    }

    /// Starts the daemon, which connects to its ports by and by.
    ///
    /// # Panics
    /// When it cannot be started, or is there already.
    pub fn start(&mut self) {
        assert!(self.daemon.is_none(), "it is started");
        let daemon = Self::command(&self.programs, &self.programs.daemon, &self.folder)
            .arg(format!("unix:{}", self.folder.join("database").display()))
            .arg(format!("--unixctl={}", self.folder.join("daemon.control").display()))
            .args(["--no-chdir", "--enable-dummy"])
            .spawn();
        self.daemon = Some(daemon.unwrap());
    }

    /// Kills the daemon.
    ///
    /// # Panics
    /// When it has ended by itself.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        assert_eq!(daemon.try_wait().unwrap(), None, "the switch has ended by itself\n{}", self.log());
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// The path on which the machine at port 0 or 1 is to listen.
    #[must_use]
    pub fn port(&self, number: u16) -> PathBuf {
        self.folder.join(format!("port{number}"))
    }

    /// What its programs said.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

impl Drop for Switch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("--- the switch\n{}\n---", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
        for child in self.daemon.iter_mut().chain([&mut self.database]) {
            child.kill().unwrap_or_default();
            child.wait().map(|_| ()).unwrap_or_default();
        }
    }
}
