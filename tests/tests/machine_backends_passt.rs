//! A guest on the network by passt, as those do it who have no root: DHCP, TCP and UDP to the host's loopback
//! interface, TCP to the guest by a forwarded port. Needs a KVM that runs stock kernels: this host's, or the
//! lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::Duration;

use outboard_tests::backends::{Backend, program};
use outboard_tests::guest::Guest;
use outboard_tests::launch::{Ended, Launch, STEP};
use outboard_tests::place::Missing;
use outboard_tests::{need, place, vfio, wait};

const MIB: usize = 1 << 20;
/// One exchange of a guest, on a quiet host.
const EXCHANGE: Duration = Duration::from_secs(30);
/// The host's 127.0.0.1, as the guest calls it; 169.254.2.1 would be the other way round where the host has
/// no network.
const HOST: &str = "10.9.0.1";
const MAC: &str = "02:00:00:00:00:07";

/// passt, and beside it what its guest talks to. What comes to this port of 127.0.0.2 is passed on to the
/// guest.
struct Net {
    passt: Backend,
    port: u16,
}

impl Net {
    fn start(program: &Path) -> Self {
        let echo = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = echo.local_addr().unwrap().port();
        let files = UdpSocket::bind(("127.0.0.1", port)).unwrap();
        thread::spawn(move || {
            for stream in echo.incoming() {
                thread::spawn(|| send_back(stream.unwrap()));
            }
        });
        thread::spawn(move || serve_files(&files));
        let more = format!("--map-host-loopback {HOST} --tcp-ports 127.0.0.2/{port}");
        let passt = Backend::passt(program, &more);
        Self { passt, port }
    }

    fn launch(&self, keys: &str) -> Launch {
        let device = format!("net,socket={}{keys}", self.passt.socket().display());
        vfio::guest("virtio_net", "", None).unwrap().arg("--vhost-user").arg(device)
    }
}

fn ready() -> Result<(), Missing> {
    place::kvm()?;
    vfio::guest("", "", None).map(|_| ())
}

/// All that comes, as it comes. A connection that breaks off is its client's to tell.
fn send_back(stream: TcpStream) {
    if let Ok(mut reader) = stream.try_clone() {
        io::copy(&mut reader, &mut &stream).unwrap_or_default();
    }
}

const BLOCK: usize = 512;

/// TFTP (RFC 1350): every question for a file is answered with what `seq 5000` prints.
fn serve_files(socket: &UdpSocket) {
    let contents: String = (1..=5000).map(|number| format!("{number}\n")).collect();
    let mut message = [0; 1024];
    while let Ok((_, from)) = socket.recv_from(&mut message) {
        let done = match message[1] {
            1 => 0,
            4 => usize::from(u16::from_be_bytes([message[2], message[3]])),
            _ => continue,
        };
        if let Some(block) = contents.as_bytes().chunks(BLOCK).nth(done) {
            let number = u16::try_from(done + 1).unwrap().to_be_bytes();
            socket.send_to(&[&[0, 3], &number[..], block].concat(), from).unwrap();
        }
    }
}

/// Has the guest ask for its address, and wait for connections.
fn join(guest: &mut Guest, net: &Net) {
    let port = net.port;
    let found = guest.run(&format!(
        r#"cat >/tmp/lease <<'END'
#!/bin/sh
[ $1 != bound ] || {{ ip addr add $ip/$mask dev $interface && ip route add default via $router; }}
END
chmod 755 /tmp/lease
ip link set eth0 up && udhcpc -i eth0 -n -q -s /tmp/lease 2>/dev/null || exit 1
ip route get {HOST} | head -n 1
nc -ll -p {port} -e cat >/dev/null 2>&1 &
for n in $(seq 100); do netstat -ltn | grep -q ":{port} " && exit; usleep 50000; done; exit 2"#
    ));
    println!("{found}");
}

/// What the guest's TCP client says comes back to it. It says that it is done only once it has all: passt
/// forgets what is still to come then, when both sides are done at about the same time.
fn outwards(guest: &mut Guest, net: &Net) {
    let text = format!(
        r#"head -c {MIB} /dev/urandom >/tmp/sent; [ -p /tmp/all ] || mkfifo /tmp/all
{{ cat /tmp/sent; read -r _ </tmp/all; }} | nc {HOST} {} | {{ head -c {MIB} >/tmp/back; echo >/tmp/all; }}
cmp /tmp/sent /tmp/back"#,
        net.port
    );
    let done = guest.exec(&text, EXCHANGE);
    assert_eq!(done.status, 0, "to the host and back: {}", done.text);
}

/// What the host's TCP client says to the guest comes back.
fn inwards(net: &Net) {
    let stream = TcpStream::connect(("127.0.0.2", net.port)).unwrap();
    stream.set_read_timeout(Some(wait::patience(EXCHANGE))).unwrap();
    stream.set_write_timeout(Some(wait::patience(EXCHANGE))).unwrap();
    let mut sent = vec![0; MIB];
    File::open("/dev/urandom").unwrap().read_exact(&mut sent).unwrap();
    let mut back = vec![0; MIB];
    thread::scope(|scope| {
        scope.spawn(|| (&stream).write_all(&sent).unwrap());
        (&stream).read_exact(&mut back).unwrap();
    });
    assert!(back == sent, "what comes back from the guest differs");
}

/// A file by datagrams.
fn datagrams(guest: &mut Guest, net: &Net) {
    let text = format!("tftp -g -r file -l /tmp/file {HOST} {} && seq 5000 | cmp - /tmp/file", net.port);
    let done = guest.exec(&text, EXCHANGE);
    assert_eq!(done.status, 0, "by TFTP: {}", done.text);
}

fn end(mut guest: Guest) -> Ended {
    guest.assert_kernel_is_content();
    guest.last_words("poweroff -f");
    let ended = guest.into_vm().end(STEP).with_code(0);
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
    println!("{:?}, {} exits", ended.took, ended.stats().exits());
    ended
}

fn talk(keys: &str, boots: u32) {
    need!(ready());
    let Some(program) = program("passt") else { return };
    let net = Net::start(&program);
    let mut guest = Guest::boot(net.launch(keys));
    for boot in 1..=boots {
        join(&mut guest, &net);
        outwards(&mut guest, &net);
        inwards(&net);
        datagrams(&mut guest, &net);
        if boot < boots {
            guest.last_words("reboot -f");
            guest.wait_ready();
        }
    }
    let ended = end(guest);
    assert!(!ended.log.contains("warn: ") && !ended.log.contains("error: "), "{ended}");
}

#[test]
fn a_guest_and_its_host_talk_by_passt_before_and_after_a_reboot() {
    talk("", 2);
}

#[test]
fn a_guest_and_its_host_talk_by_passt_over_virtio_pci() {
    talk(",transport=pci", 1);
}

#[test]
fn the_link_goes_on_when_passt_is_killed_under_load_and_started_again() {
    const KILLS: u64 = 3;
    need!(ready());
    let Some(program) = program("passt") else { return };
    let mut net = Net::start(&program);
    let mut guest = Guest::boot(net.launch(&format!(",reconnect=0,mac={MAC}")));
    join(&mut guest, &net);
    assert_eq!(guest.run("cat /sys/class/net/eth0/address"), MAC);
    let received = "cat /sys/class/net/eth0/statistics/rx_bytes";
    for _ in 0..KILLS {
        // There and back without end.
        guest.run(&format!("nc {HOST} {} </dev/zero >/dev/null 2>&1 & echo $! >/tmp/load", net.port));
        let before = guest.number(received);
        wait::until("load", EXCHANGE, || (guest.number(received) > before + MIB as u64 / 4).then_some(()));
        net.passt.kill_and_restart();
        // Connections of the first passt are nothing to the second, which says so.
        let gone = "for n in $(seq 500); do kill -0 $(cat /tmp/load) 2>/dev/null || exit 0; usleep 100000; done; exit 1";
        assert_eq!(guest.exec(gone, 2 * EXCHANGE).status, 0, "the load waits for ever");
        outwards(&mut guest, &net);
        inwards(&net);
        datagrams(&mut guest, &net);
    }
    let ended = end(guest);
    assert_eq!(ended.stats().number("/devices/0/recoveries"), KILLS, "{ended}");
    // Each passt is told where the guest is; that it takes that is all that it does with it.
    let trace = fs::read_to_string(ended.files.path("trace")).unwrap();
    let announced = trace.lines().filter(|line| line.contains("> SEND_RARP"));
    assert_eq!(announced.count() as u64, KILLS, "{ended}");
}
