//! What people get wrong, each with one sentence, its cause, a hint, the right exit code, and nothing left
//! behind. Runs anywhere; what lies beyond a working KVM is skipped where there is none.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use outboard_tests::explained::assert_explained;
use outboard_tests::launch::{Ended, Launch, STEP};
use outboard_tests::payload::{self, CommandLine};
use outboard_tests::peer::{Peer, stale_socket};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place, wait};

/// Usage or configuration; this host; a peer.
const USAGE: i32 = 2;
const HOST: i32 = 3;
const PEER: i32 = 4;

/// Runs `outboard run` with arguments that must not work.
fn refuse(arguments: &[&str]) -> Ended {
    Launch::new(["run"]).args(arguments).run()
}

fn files() -> (Scratch, String) {
    let scratch = Scratch::new();
    let kernel = payload::write_tiny_kernel(scratch.folder()).unwrap();
    let kernel = kernel.to_str().unwrap().to_owned();
    (scratch, kernel)
}

#[test]
fn a_missing_kernel() {
    let ended = refuse(&["--kernel", "/nonexistent/vmlinuz"]);
    assert_explained(
        ended,
        USAGE,
        "cannot open the kernel /nonexistent/vmlinuz",
        "No such file or directory",
        "is the path right",
    );
    assert_explained(refuse(&[]), USAGE, "no kernel was given", "", "pass --kernel FILE");
}

#[test]
fn a_missing_initramfs() {
    let (_scratch, kernel) = files();
    let ended = refuse(&["--kernel", &kernel, "--initramfs", "/nonexistent/initrd"]);
    assert_explained(
        ended,
        USAGE,
        "cannot open the initramfs /nonexistent/initrd",
        "No such file",
        "is the path right",
    );
}

#[test]
fn a_file_that_is_no_kernel() {
    need!(place::kvm());
    let (scratch, _) = files();
    let text = b"#!/bin/sh\necho I am a script\n".repeat(100);
    let elf_of_another_machine = {
        let mut elf = payload::tiny_kernel().to_vec();
        elf[18] = 0xb7; // aarch64
        elf
    };
    for (name, contents) in [
        ("empty", &b""[..]),
        ("short", b"\x7fELF"),
        ("text", &text),
        ("zeros", &[0; 8192]),
        ("cut-off", &payload::tiny_kernel()[..3000]),
        ("aarch64", &elf_of_another_machine),
    ] {
        let path = scratch.file(name, contents);
        let ended = refuse(&["--kernel", path.to_str().unwrap()]).with_code(USAGE);
        assert!(
            ended.log.starts_with(&format!("outboard: cannot boot {}\n  because: ", path.display())),
            "{name}\n{ended}"
        );
        assert!(ended.log.lines().count() <= 4, "{name}\n{ended}");
    }
    let folder = refuse(&["--kernel", scratch.folder().to_str().unwrap()]).with_code(USAGE);
    assert!(folder.log.contains("  because: "), "{folder}");
}

#[test]
fn a_kernel_that_is_made_shorter_while_it_is_loaded() {
    const SEGMENT: u64 = 480 << 20;
    const START: u64 = 0x1000;
    need!(place::kvm());
    let scratch = Scratch::new();
    // One segment that takes a while to be copied; as it is read-only, no zeros are looked for in it.
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend(words(&[1 << 20, 64, 0]));
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    elf.extend(words(&[START, 1 << 20, 1 << 20, SEGMENT, SEGMENT, START]));
    let path = scratch.file("kernel", &elf);
    let set_length = |length| fs::File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
    set_length(START + SEGMENT);
    let vm = Launch::new(["run", "--memory", "512M", "--kernel"]).arg(&path).start();
    // The kernel is copied through a pipe that outboard makes after it has opened the kernel.
    wait::until("the kernel is copied", STEP, || {
        let link = |number: u32| fs::read_link(format!("/proc/{}/fd/{number}", vm.pid())).ok();
        let open: Vec<_> = (3..32).filter_map(link).collect();
        let is_pipe = |to: &&PathBuf| to.to_string_lossy().starts_with("pipe:");
        open.contains(&path).then(|| open.iter().find(is_pipe).map(drop))?
    });
    set_length(START);
    let ended = vm.end(STEP);
    assert_explained(ended, USAGE, "cannot boot", "bytes early", "another program writing");
}

#[test]
fn a_kernel_too_large_for_the_memory() {
    need!(place::kvm());
    let (scratch, kernel) = files();
    let big = scratch.path("initramfs");
    fs::File::create(&big).unwrap().set_len(64 << 20).unwrap();
    let ended = refuse(&["--kernel", &kernel, "--memory", "32M", "--initramfs", big.to_str().unwrap()])
        .with_code(USAGE);
    assert!(ended.log.contains("cannot boot") && ended.log.contains("hint: "), "{ended}");

    // A segment that wants 64 MiB.
    let mut elf = payload::tiny_kernel().to_vec();
    let segments = usize::try_from(u64::from_le_bytes(elf[32..40].try_into().unwrap())).unwrap();
    let load = (0..usize::from(elf[56])).map(|n| segments + 56 * n).find(|at| elf[*at] == 1).unwrap();
    elf[load + 40..load + 48].copy_from_slice(&(64_u64 << 20).to_le_bytes());
    let big = scratch.file("big-kernel", &elf);
    let ended = refuse(&["--kernel", big.to_str().unwrap(), "--memory", "32M"]).with_code(USAGE);
    assert!(ended.log.contains("cannot boot") && ended.log.contains("hint: "), "{ended}");
}

#[test]
fn odd_memory_sizes() {
    for (memory, sentence, hint) in [
        ("129M", "--memory 129M is not a multiple of 2 MiB", "try 128M"),
        ("1000000", "--memory 1000000 is not a multiple of 2 MiB", "try "),
        ("0", "not a multiple", "try"),
        ("256", "--memory 256 is not a multiple of 2 MiB", "is 256M meant"),
        ("16M", "--memory 16M is too little", "give at least 32M"),
        ("lots", "cannot use the size `lots`", "write a size such as 512M"),
        ("-1G", "cannot use the size `-1G`", "write a size"),
        ("99999999999999999999G", "cannot use the size", "write a size"),
        ("512M,hugepages=3M", "cannot use hugepages=3M", "the sizes are 2M and 1G"),
        ("512M,colour=red", "--memory has no key `colour`", "its keys are hugepages"),
    ] {
        let memory = format!("--memory={memory}");
        assert_explained(refuse(&["--kernel", "/k", &memory]), USAGE, sentence, "", hint);
    }
}

#[test]
fn more_memory_than_a_processor_addresses() {
    need!(place::kvm());
    let (_scratch, kernel) = files();
    let ended = refuse(&["--kernel", &kernel, "--memory", "8388608G"]);
    assert_explained(ended, HOST, "guest memory of", "physical memory", "give less --memory");
}

#[test]
fn huge_pages_that_are_not_reserved() {
    need!(place::kvm());
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages");
    if free.is_ok_and(|free| free.trim() != "0") {
        return place::Missing::skipped("huge pages", "this host has some to spare");
    }
    let (_scratch, kernel) = files();
    let ended = refuse(&["--kernel", &kernel, "--memory", "1G,hugepages=1G"]).with_code(HOST);
    assert!(ended.log.contains("  because: ") && ended.log.contains("  hint: "), "{ended}");
}

#[test]
fn options_that_do_not_exist_or_do_not_work_yet() {
    for arguments in [
        &["--kernel", "/k", "--colour", "red"][..],
        &["--kernel", "/k", "--control", "/c"],
        &["--kernel", "/k", "--incoming", "unix:/m"],
        &["--kernel", "/k", "--cpus", "0"],
        &["--kernel", "/k", "--cpus", "256"],
        &["--kernel", "/k", "--discovery", "guess"],
        &["--kernel"],
        &["surplus"],
    ] {
        let ended = refuse(arguments).with_code(USAGE);
        assert!(ended.log.starts_with("error: ") && ended.log.contains("--help"), "{arguments:?}\n{ended}");
        assert_eq!(ended.console, "");
    }
    for (option, device, sentence, hint) in [
        ("--vhost-user", "floppy,socket=/s", "no virtio device type `floppy`", "the types are "),
        ("--vhost-user", "generic:0,socket=/s", "no virtio device type `generic:0`", "generic:DEVICE_ID"),
        ("--vhost-user", "blk", "--vhost-user blk needs a socket", "for example --vhost-user blk,socket="),
        ("--vhost-user", "blk,socket=", "needs a socket", "for example"),
        (
            "--vhost-user",
            "blk,socket=/s,transport=isa",
            "cannot use transport=isa",
            "transport=mmio or transport=pci",
        ),
        ("--vhost-user", "blk,socket=/s,reconnect=soon", "cannot use reconnect=soon", "a whole number"),
        ("--vhost-user", "blk,socket=/s,server=maybe", "cannot use server=maybe", "server=on or server=off"),
        (
            "--vhost-user",
            "blk,socket=/s,queues=0",
            "cannot use queues=0",
            "queues is a whole number from 1 to",
        ),
        (
            "--vhost-user",
            "blk,socket=/s,deadline=soon",
            "cannot use deadline=soon",
            "deadline is a whole number",
        ),
        ("--vhost-user", "blk,socket=/s,colour=red", "has no key `colour`", "its keys are socket"),
        (
            "--vhost-user",
            "blk,socket=fd=99",
            "cannot use descriptor 99 as a socket",
            "must leave one end of a socket pair open",
        ),
        ("--vhost-user", "blk,socket=/a,b", "cannot use `b`", "a comma inside a value twice"),
        ("--vhost-user", "blk,socket=/s,tag=x", "cannot use tag=x", ""),
        ("--vfio-user", "id=nvme", "--vfio-user needs a socket", "for example --vfio-user socket="),
        ("--vfio-user", "socket=/s,colour=red", "--vfio-user has no key `colour`", "its keys are socket"),
        ("--vfio-user", "socket=/s,deadline=soon", "cannot use deadline=soon", "deadline is a whole number"),
        ("--vfio-user", "socket=/s,posted-writes=soon", "cannot use posted-writes=soon", "posted-writes=off"),
    ] {
        let ended = refuse(&["--kernel", "/k", option, device]);
        let cause = if device.contains("fd=") { "os error 9" } else { "" };
        assert_explained(ended, USAGE, sentence, cause, hint);
    }
    assert_explained(
        refuse(&["--kernel", "/k", "--serial", "printer"]),
        USAGE,
        "--serial cannot use `printer`",
        "",
        "write stdio, null, file=PATH or socket=PATH",
    );
}

/// None of these is found out by opening a file or by connecting: the kernel and the peers are not there.
#[test]
fn what_the_configuration_alone_shows_to_be_wrong() {
    let long = format!("socket=/{}", "x".repeat(107));
    for (arguments, sentence, hint) in [
        (
            &["--vhost-user", "blk,socket=/a,id=x", "--vfio-user", "socket=/b,id=x"][..],
            "two devices are called x",
            "another id=",
        ),
        (
            &["--vhost-user", "blk,socket=/a", "--vhost-user", "blk,socket=/b,id=blk0"],
            "two devices are called blk0",
            "another id=",
        ),
        (
            &["--vhost-user", "blk,server=on,socket=/a", "--serial", "socket=/a"],
            "would listen on /a",
            "a path of its own",
        ),
        (&["--vhost-user", &format!("blk,{long}")], "has 108 bytes", "at most 107 bytes"),
        (&["--vhost-user", &format!("blk,server=on,{long}")], "has 108 bytes", "at most 107 bytes"),
        (&["--vfio-user", &long], "has 108 bytes", "at most 107 bytes"),
        (&["--serial", &long], "has 108 bytes", "at most 107 bytes"),
    ] {
        assert_explained(refuse(&[&["--kernel", "/k"], arguments].concat()), USAGE, sentence, "", hint);
    }
}

#[test]
fn arguments_that_are_not_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"quiet \xff");
    let ended = Launch::new(["run", "--kernel", "/k", "--cmdline"]).arg(odd).run();
    assert_explained(ended, USAGE, "the argument `quiet \u{fffd}` is not valid UTF-8", "", "UTF-8");
    // A path may be any bytes.
    let device = std::ffi::OsStr::from_bytes(b"blk,socket=/nonexistent/\xff");
    let ended = Launch::new(["run", "--kernel", "/nonexistent/k", "--vhost-user"]).arg(device).run();
    assert_explained(
        ended,
        USAGE,
        "cannot open the kernel /nonexistent/k",
        "No such file",
        "is the path right",
    );
}

#[test]
fn configuration_files_that_make_no_sense() {
    let scratch = Scratch::new();
    let config = |name: &str, text: &str| {
        let path = scratch.file(name, text.as_bytes());
        refuse(&["--config", path.to_str().unwrap()]).with_code(USAGE)
    };
    let typo = config("typo", "kernel = '/k'\nmemroy = '1G'\n");
    assert!(typo.log.contains("cannot use the configuration") && typo.log.contains("memroy"), "{typo}");
    let syntax = config("syntax", "kernel = \n");
    assert!(syntax.log.contains("cannot use the configuration") && syntax.log.contains("line 1"), "{syntax}");
    let value = config("value", "kernel = '/k'\ndiscovery = 'guess'\n");
    assert!(value.log.contains("discovery cannot be `guess`"), "{value}");
    let absent = refuse(&["--config", "/nonexistent.toml"]).with_code(USAGE);
    assert!(absent.log.contains("cannot use the configuration /nonexistent.toml"), "{absent}");
    let endless = refuse(&["--config", "/dev/zero"]).with_code(USAGE);
    assert!(endless.log.contains("larger than 1 MiB"), "{endless}");
}

/// `outboard run` with the tiny kernel and one disk.
fn with_disk(socket: &Path, more: &str) -> Launch {
    let launch = Launch::payload(&CommandLine::new("hello"));
    // Without -v, so that standard error holds the error alone.
    let device = format!("blk,socket={},id=disk0{more}", socket.display());
    launch.without_log().arg("--vhost-user").arg(device)
}

#[test]
fn sockets_that_are_absent_stale_or_no_sockets() {
    need!(place::kvm());
    let scratch = Scratch::new();
    let absent = scratch.path("absent");
    let sentence = "cannot start device disk0";
    let cause = format!("cannot connect to vhost-user backend {}", absent.display());
    assert_explained(with_disk(&absent, "").run(), PEER, sentence, &cause, "start the backend first");

    let stale = scratch.path("stale");
    stale_socket(&stale);
    assert_explained(
        with_disk(&stale, "").run(),
        PEER,
        sentence,
        "Connection refused",
        "the socket file is stale",
    );

    let file = scratch.file("file", b"");
    assert_explained(with_disk(&file, "").run(), PEER, sentence, "Connection refused", "it is no socket");

    let long = scratch.path(&"x".repeat(120));
    assert_explained(with_disk(&long, "").run(), USAGE, "the path of the socket", "", "at most 107 bytes");
}

#[test]
fn a_socket_that_is_silent_fails_at_its_deadline() {
    need!(place::kvm());
    for (more, deadline) in [(",deadline=300", 300), ("", 2000)] {
        let silent = Peer::silent();
        let ended = with_disk(&silent.socket(), more).run();
        let took = ended.took;
        let cause = format!(
            "vhost-user backend {} did not answer GET_FEATURES within {deadline} ms",
            silent.socket().display()
        );
        assert_explained(
            ended,
            PEER,
            "cannot start device disk0",
            &cause,
            "is the backend already serving another machine?",
        );
        // Our clock starts when the process runs already.
        assert!(took >= Duration::from_millis(deadline - 100), "{took:?}");
        assert!(
            took < Duration::from_millis(deadline) + outboard_tests::wait::patience(Duration::from_secs(1)),
            "{took:?}"
        );
    }
}

#[test]
fn a_socket_that_answers_garbage() {
    need!(place::kvm());
    for (name, bytes, cause) in [
        ("http", &b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"[..], "answered GET_FEATURES"),
        ("another request", b"\x02\0\0\0\x05\0\0\0\x08\0\0\0AAAAAAAA", "answered GET_FEATURES"),
        ("no reply flag", b"\x01\0\0\0\x01\0\0\0\x08\0\0\0AAAAAAAA", "answered GET_FEATURES"),
        ("a size of 4 GiB", b"\x01\0\0\0\x05\0\0\0\xff\xff\xff\xffAAAAAAAA", "answered GET_FEATURES"),
        ("a size of 4", b"\x01\0\0\0\x05\0\0\0\x04\0\0\0AAAA", "with 4 bytes where 8 are due"),
    ] {
        let peer = Peer::answering(bytes);
        let ended = with_disk(&peer.socket(), ",deadline=1000").run();
        println!("{name}: {}", ended.log);
        assert_explained(ended, PEER, "cannot start device disk0", cause, "is this a vhost-user socket?");
    }
    let half = Peer::answering(b"\x01\0\0\0\x05\0\0\0\x08\0");
    let ended = with_disk(&half.socket(), ",deadline=500").run().with_code(PEER);
    assert!(ended.log.contains("did not answer GET_FEATURES within 500 ms"), "{ended}");
    let closing = Peer::closing();
    let ended = with_disk(&closing.socket(), "").run();
    assert_explained(
        ended,
        PEER,
        "cannot start device disk0",
        "closed the connection at GET_FEATURES",
        "is this a vhost-user socket?",
    );
}

#[test]
fn two_devices_of_one_name() {
    need!(place::kvm());
    let disk = need!(outboard_tests::daemon::StorageDaemon::start(1 << 20));
    let again = format!("blk,socket={},id=disk0", disk.socket().display());
    let ended = with_disk(&disk.socket(), "").arg("--vhost-user").arg(again).run();
    assert_explained(ended, USAGE, "two devices are called disk0", "", "another id=");
}

#[test]
fn outputs_that_cannot_be_written() {
    need!(place::kvm());
    let (scratch, kernel) = files();
    let ended = refuse(&["--kernel", &kernel, "--stats", "/nonexistent/stats"]);
    assert_explained(ended, USAGE, "cannot write statistics to /nonexistent/stats", "No such file", "");
    let ended = refuse(&["--kernel", &kernel, "--serial", "file=/nonexistent/log"]);
    assert_explained(ended, USAGE, "cannot write the serial output to /nonexistent/log", "No such file", "");
    let taken = scratch.path("taken");
    let _other = std::os::unix::net::UnixListener::bind(&taken).unwrap();
    let ended = refuse(&["--kernel", &kernel, "--serial", &format!("socket={}", taken.display())]);
    assert_explained(
        ended,
        USAGE,
        "cannot listen for the console",
        "Address already in use",
        "is another machine using it?",
    );
    assert!(taken.exists(), "a socket that was there before is not ours to remove");
    for device in
        [["--serial", "socket=/nonexistent/s"], ["--vhost-user", "blk,server=on,socket=/nonexistent/s"]]
    {
        let ended = refuse(&["--kernel", &kernel, device[0], device[1]]);
        assert_explained(ended, USAGE, "cannot listen for the", "No such file", "a directory that exists");
    }
}

/// Runs a shell command line around the program, as root of a mount namespace of its own.
fn in_a_namespace(script: &str) -> Option<Ended> {
    let works = Command::new("unshare").args(["-m", "true"]).output().is_ok_and(|done| done.status.success());
    if !works {
        place::Missing::skipped("a host without KVM", "there are no mount namespaces here");
        return None;
    }
    let (_scratch, kernel) = files();
    let words: [OsString; 5] =
        ["-c".into(), script.into(), "sh".into(), place::outboard().into(), kernel.into()];
    Some(Launch::program("unshare", ["-m", "sh"]).args(words).run())
}

#[test]
fn a_host_without_kvm() {
    let Some(ended) = in_a_namespace("mount -t tmpfs none /dev && exec \"$1\" run --kernel \"$2\"") else {
        return;
    };
    assert_explained(ended, HOST, "/dev/kvm", "No such file or directory", "kvm");
}

#[test]
fn a_user_who_may_not_use_kvm() {
    need!(place::kvm());
    let nobody =
        Command::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups", "true"]).output();
    if !nobody.is_ok_and(|done| done.status.success()) {
        return place::Missing::skipped("a user who may not", "setpriv cannot make another user here");
    }
    // A user who may run the program, but not open a device of root's.
    let scratch = Scratch::new();
    fs::set_permissions(scratch.folder(), Permissions::from_mode(0o755)).unwrap();
    let kernel = payload::write_tiny_kernel(scratch.folder()).unwrap();
    let program = scratch.path("outboard");
    fs::copy(place::outboard(), &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    if fs::metadata("/dev/kvm").unwrap().permissions().mode() & 0o006 != 0 {
        return place::Missing::skipped("a user who may not", "everybody may use /dev/kvm here");
    }
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let ended = Launch::program("setpriv", nobody).arg(&program).args(["run", "--kernel"]).arg(kernel).run();
    assert_explained(ended, HOST, "/dev/kvm", "Permission denied", "kvm");
}

#[test]
fn help_and_version_succeed() {
    for arguments in
        [&["--help"][..], &["--version"], &["run", "--help"], &["check", "--help"], &["probe", "--help"]]
    {
        let ended = Launch::new(arguments).run().with_code(0);
        assert!(ended.console.contains("outboard") && ended.log.is_empty(), "{ended}");
    }
    let usage = Launch::new(["run", "--help"]).run();
    for option in
        ["--kernel", "--initramfs", "--cmdline", "--memory", "--cpus", "--vhost-user", "--serial", "--stats"]
    {
        assert!(usage.console.contains(option), "{option}\n{usage}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = Launch::new(["completions", shell]).run().with_code(0);
        assert!(script.console.contains("vhost-user"), "{script}");
    }
    let nothing: [&str; 0] = [];
    Launch::new(nothing).run().with_code(USAGE);
}

#[test]
fn a_failed_start_leaves_no_socket_behind() {
    need!(place::kvm());
    let scratch = Scratch::new();
    let console = scratch.path("console");
    let launch =
        with_disk(&scratch.path("absent"), "").arg("--serial").arg(format!("socket={}", console.display()));
    let ended = launch.start().end(STEP).with_code(PEER);
    assert!(scratch.names().is_empty(), "{:?}\n{ended}", scratch.names());
}
