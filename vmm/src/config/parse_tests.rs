use super::*;
use devices::pci::vfio_user::Wishes as FunctionWishes;

#[test]
fn sizes_take_binary_suffixes_and_nothing_else() {
    assert_eq!(parse_size("512M"), Some(512 << 20));
    assert_eq!(parse_size("2g"), Some(2 << 30));
    assert_eq!(parse_size("4096"), Some(4096));
    for bad in ["", "M", "-1", "1.5G", "0x10", "99999999999999999999", "18446744073709551615K", "+3"] {
        assert_eq!(parse_size(bad), None, "{bad}");
    }
}

#[test]
fn odd_memory_size_is_refused_with_the_nearest_one() {
    let error = parse_memory("129M").unwrap_err();
    let mut out = Vec::new();
    error.report(&mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains("129M is not a multiple of 2 MiB") && text.contains("try 128M"), "{text}");
}

#[test]
fn vhost_user_takes_every_key() {
    let device = parse_vhost_user(
        "blk,socket=/s,id=disk0,transport=pci,queues=2,queue-size=128,deadline=500,features=-event_idx",
    )
    .unwrap();
    assert_eq!(device.id.as_deref(), Some("disk0"));
    assert_eq!((device.queues, device.queue_size), (Some(2), Some(128)));
    assert_eq!(device.deadline, Duration::from_millis(500));
    assert_eq!(device.transport, Transport::Pci);
}

#[test]
fn sockets_that_we_make_say_whom_they_are_for() {
    let device = parse_vhost_user("net,socket=/s,server=on,mode=660,allow-user=4711").unwrap();
    assert_eq!(device.admission, Admission { mode: Some(0o660), user: Some(4711) });
    let device = parse_vhost_user("net,socket=@s,allow-user=root").unwrap();
    assert_eq!(device.admission, Admission { mode: None, user: Some(0) });
    let Serial::Socket(path, admission) = parse_serial("socket=/a,,b,mode=666").unwrap() else {
        panic!("no socket")
    };
    assert_eq!((path, admission.mode), (PathBuf::from("/a,b"), Some(0o666)));
    assert!(parse_serial("socket=/a,colour=red").unwrap_err().to_string().contains("no key `colour`"));
}

#[test]
fn vhost_user_refuses_what_it_cannot_do() {
    for (text, part) in [
        ("blk", "needs a socket"),
        ("socket=/s", "needs a device type"),
        ("floppy,socket=/s", "no virtio device type `floppy`"),
        ("blk,socket=/s,colour=red", "has no key `colour`"),
        ("blk,socket=/s,id=a,id=b", "got `id` twice"),
        ("blk,socket=/s,queue-size=100", "cannot make this blk device"),
        ("blk,socket=/s,queues=0", "queues=0"),
        ("blk,socket=/s,transport=isa", "transport=isa"),
        ("blk,socket=/s,server=maybe", "server=maybe"),
        ("blk,socket=/s,reconnect=soon", "reconnect=soon"),
        ("blk,socket=/s,mtu=1500", "mtu=1500"),
        ("net,socket=/s,mtu=67", "mtu=67"),
        ("blk,socket=/s,mac=02:00:00:00:00:01", "mac=02:00:00:00:00:01"),
        ("net,socket=/s,mac=03:00:00:00:00:01", "mac=03:00:00:00:00:01"),
        ("net,socket=/s,mac=00:00:00:00:00:00", "mac=00:00:00:00:00:00"),
        ("net,socket=/s,mac=2:0:0:0:0:1", "mac=2:0:0:0:0:1"),
        ("net,socket=/s,mac=02:00:00:00:00:+1", "mac=02:00:00:00:00:+1"),
        ("net,socket=/s,mac=02:00:00:00:00:00:01", "mac=02:00:00:00:00:00:01"),
        ("blk,socket=/s,gpu-socket=/d", "gpu-socket=/d"),
        ("blk,socket=/s,iommu=yes", "iommu=yes"),
        ("blk,socket=fd=x", "no inherited descriptor"),
        ("blk,/s", "only its first item"),
        ("blk,socket=/s,features=-nonsense", "features=-nonsense"),
        ("blk,socket=/s,mode=666", "has no key `mode`"),
        ("blk,socket=/s,server=on,mode=999", "mode=999"),
        ("blk,socket=/s,server=on,mode=1777", "mode=1777"),
        ("blk,socket=/s,allow-user=nobody-has-this-name", "allow-user=nobody-has-this-name"),
    ] {
        let error = parse_vhost_user(text).unwrap_err();
        assert!(error.to_string().contains(part), "{text}: {error}");
        assert_eq!(error.fault().exit_code(), 2);
    }
}

#[test]
fn vfio_user_takes_every_key() {
    let device = parse_vfio_user("socket=/s,id=nvme0,deadline=500,posted-writes=off,reset=off").unwrap();
    assert!(matches!(&device.socket, Socket::Path(path) if path == std::path::Path::new("/s")));
    assert_eq!(device.id.as_deref(), Some("nvme0"));
    assert_eq!(device.deadline, Duration::from_millis(500));
    assert_eq!(device.wishes.writes, Some(Writes::Answered));
    assert_eq!(device.wishes.reset, Some(Reset::Unused));
    assert_eq!(parse_vfio_user("socket=/s").unwrap().wishes, FunctionWishes::default());
    assert_eq!(parse_vfio_user("socket=/s,reset=on").unwrap().wishes, FunctionWishes::default());
}

#[test]
fn vfio_user_refuses_what_it_cannot_do() {
    for (text, part) in [
        ("", "needs a socket"),
        ("socket=", "needs a socket"),
        ("nvme,socket=/s", "cannot use `nvme`"),
        ("socket=/s,colour=red", "has no key `colour`"),
        ("socket=/s,posted-writes=maybe", "posted-writes=maybe"),
        ("socket=/s,reset=maybe", "reset=maybe"),
        ("socket=/s,deadline=0", "deadline=0"),
        ("socket=/s,id=a b", "id=a b"),
        ("socket=fd=x", "no inherited descriptor"),
    ] {
        let error = parse_vfio_user(text).unwrap_err();
        let mut out = Vec::new();
        error.report(&mut out).unwrap();
        let said = String::from_utf8(out).unwrap();
        assert!(said.contains(part), "{text}: {said}");
    }
}

#[test]
fn a_comma_that_is_written_twice_belongs_to_the_value() {
    let path = |text: &str| match parse_vhost_user(text).unwrap().socket {
        Socket::Path(path) => path.to_str().unwrap().to_owned(),
        other => panic!("{other}"),
    };
    assert_eq!(path("blk,socket=/a,,b,id=x"), "/a,b");
    assert_eq!(path("blk,socket=/a,,,id=x"), "/a,");
    assert_eq!(path("blk,socket=,,,,=,id=x"), ",,=");
    let error = parse_vhost_user("blk,socket=/a,b").unwrap_err();
    let mut out = Vec::new();
    error.report(&mut out).unwrap();
    assert!(String::from_utf8(out).unwrap().contains("a comma inside a value twice"));
}

#[test]
fn paths_are_bytes_and_everything_else_is_utf8() {
    let odd = OsStr::from_bytes(b"/run/\xff\xfe,,x");
    let bytes = [b"blk,socket=".as_slice(), odd.as_bytes()].concat();
    let device = parse_vhost_user(OsStr::from_bytes(&bytes)).unwrap();
    assert!(matches!(device.socket, Socket::Path(path) if path.as_os_str().as_bytes() == b"/run/\xff\xfe,x"));
    let error = parse_vhost_user(OsStr::from_bytes(b"blk,socket=/s,id=\xff")).unwrap_err();
    assert!(error.to_string().contains("cannot use id="), "{error}");
    let Serial::File(path) = parse_serial(OsStr::from_bytes(b"file=/\xff")).unwrap() else {
        panic!("no file")
    };
    assert_eq!(path.as_os_str().as_bytes(), b"/\xff");
}

#[test]
fn times_have_a_unit_of_their_own_and_take_others() {
    let times = |text: &str| {
        let device = parse_vhost_user(text).unwrap();
        (device.deadline, device.reconnect)
    };
    let (ms, s) = (Duration::from_millis, Duration::from_secs);
    assert_eq!(times("blk,socket=/s,deadline=1500,reconnect=2"), (ms(1500), Some(s(2))));
    assert_eq!(times("blk,socket=/s,deadline=3s,reconnect=500ms"), (s(3), Some(ms(500))));
    for bad in
        ["deadline=2m", "deadline=s", "deadline=1.5s", "deadline=3601s", "reconnect=+1", "reconnect=-1"]
    {
        assert!(parse_vhost_user(format!("blk,socket=/s,{bad}")).is_err(), "{bad}");
    }
}

#[test]
fn a_size_without_a_unit_is_asked_about() {
    for (size, meant) in
        [("256", "is 256M meant?"), ("1048575", "try 32M"), ("129M", "try 128M"), ("3M", "try 32M")]
    {
        let mut out = Vec::new();
        parse_memory(size).unwrap_err().report(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains(meant), "{text}");
    }
    assert!(parse_memory("8GB").is_err(), "decimal, for some");
    assert_eq!(parse_memory("512MiB").unwrap().size, 512 << 20);
}

#[test]
fn every_device_type_has_a_constructor() {
    use devices::virtio::types::table::DeviceType;
    assert_eq!(VhostUser::CONSTRUCTORS, DeviceType::names());
}

#[test]
fn the_configuration_alone_shows_equal_ids_long_paths_and_equal_listeners() {
    use super::super::{Config, Image};
    let refusal = |devices: Vec<VhostUser>, serial: Serial| {
        let mut config = Config::new(Image::Path("/k".into()));
        (config.vhost_user, config.serial) = (devices, serial);
        config.vfio_user.push(VfioUser::new("/f").id("nvme0"));
        config.settle().map(|()| config.vhost_user).map_err(|error| error.to_string())
    };
    let long = format!("/{}", "x".repeat(107));
    for (devices, serial, part) in [
        (
            vec![VhostUser::blk("/a"), VhostUser::net("/b").id("blk0")],
            Serial::Null,
            "two devices are called blk0",
        ),
        (vec![VhostUser::blk("/a").id("nvme0")], Serial::Null, "two devices are called nvme0"),
        (vec![VhostUser::blk(&long)], Serial::Null, "has 108 bytes"),
        (vec![], Serial::Socket(long.into(), Admission::default()), "has 108 bytes"),
        (vec![VhostUser::blk("")], Serial::Null, "is empty"),
        (
            vec![VhostUser::blk("/a").server(), VhostUser::net("/a").server()],
            Serial::Null,
            "would listen on /a",
        ),
        (
            vec![VhostUser::blk("/a").server()],
            Serial::Socket("/a".into(), Admission::default()),
            "would listen on /a",
        ),
        (vec![VhostUser::new("floppy", "/a")], Serial::Null, "no virtio device type"),
        (vec![VhostUser::fs("/a").tag("x".repeat(37))], Serial::Null, "tag="),
        (vec![VhostUser::blk("/a").features("-nonsense")], Serial::Null, "features=-nonsense"),
    ] {
        let said = refusal(devices, serial).unwrap_err();
        assert!(said.contains(part), "{said}");
    }
    let devices =
        refusal(vec![VhostUser::blk("/a"), VhostUser::new("generic:42", "/a")], Serial::Null).unwrap();
    let ids: Vec<_> = devices.iter().map(|device| device.id.as_deref().unwrap()).collect();
    assert_eq!(ids, ["blk0", "generic1"]);
}
