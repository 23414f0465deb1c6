//! `outboard probe vhost-user`: reports what a backend offers.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use devices::virtio::types::table::DeviceType;
use serde::Serialize;
use transport::peer::{Cause, Limits};
use transport::vhost_user::features::bit;
use transport::vhost_user::{Connection, DeviceFeatures, ProtocolFeatures, Session, Wanted};

use crate::error::Error;

/// The offer of a vhost-user backend.
#[derive(Clone, Debug, Serialize)]
pub struct VhostUserReport {
    /// Its socket.
    pub socket: String,
    /// Device features, all bits.
    pub features: String,
    /// Their names; `bitN` for those that belong to the device type.
    pub feature_names: Vec<String>,
    /// Protocol features, all bits.
    pub protocol_features: String,
    /// Their names.
    pub protocol_feature_names: Vec<String>,
    /// The answer to GET_QUEUE_NUM, when the protocol features allow the request.
    pub queues: Option<u16>,
    /// The first bytes of the configuration space in hexadecimal, when there is one.
    pub config: Option<String>,
    /// Regions of shared memory and their sizes, when there are any.
    pub shared_memory: Vec<u64>,
    /// Unusual properties of the backend.
    pub quirks: Vec<String>,
}

/// The sizes in which the configuration space is asked for: the largest, then those of common devices.
/// Several backends refuse every size except their own.
const CONFIG_SIZES: [usize; 6] = [256, 96, 60, 44, 24, 8];

/// Asks the backend at `socket`. If `device` is known, the request for the configuration space is not larger
/// than that device's space.
///
/// # Errors
/// When the backend cannot be reached or does not speak vhost-user.
pub fn vhost_user(
    socket: &Path,
    limits: &Limits,
    device: Option<DeviceType>,
) -> Result<VhostUserReport, Error> {
    let session = ask(socket, limits).map_err(|error| {
        let hint = error.hint();
        super::failed(socket, hint).because(error)
    })?;
    report(socket, session, device)
}

fn ask(socket: &Path, limits: &Limits) -> Result<Session, transport::peer::Error> {
    // A backend reports the sizes of its shared memory only after SHMEM is negotiated, and SHMEM needs
    // BACKEND_SEND_FD.
    let wanted = Wanted::default().and(ProtocolFeatures::BACKEND_SEND_FD.with(ProtocolFeatures::SHMEM));
    Connection::connect(socket, limits)?.negotiate(&wanted)
}

fn report(socket: &Path, mut session: Session, kind: Option<DeviceType>) -> Result<VhostUserReport, Error> {
    let (device, protocol) = session.offered_raw();
    let agreed = session.protocol();
    let mut quirks = Vec::new();
    let queues = agreed.contains(ProtocolFeatures::MQ).then(|| session.queue_num());
    let config = if agreed.contains(ProtocolFeatures::CONFIG) {
        config(&mut session, kind, &mut quirks)
    } else {
        None
    };
    let shared_memory = if agreed.contains(ProtocolFeatures::SHMEM) {
        session.shmem_config().unwrap_or_else(|error| {
            quirks.push(format!("offers SHMEM and does not tell its regions: {error}"));
            Vec::new()
        })
    } else {
        Vec::new()
    };
    notice(device, protocol, &mut quirks);
    Ok(VhostUserReport {
        socket: socket.display().to_string(),
        features: format!("{:#x}", device.bits()),
        feature_names: names(&device.to_string()),
        protocol_features: format!("{:#x}", protocol.bits()),
        protocol_feature_names: names(&protocol.to_string()),
        queues,
        config,
        shared_memory,
        quirks,
    })
}

fn names(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn config(session: &mut Session, kind: Option<DeviceType>, quirks: &mut Vec<String>) -> Option<String> {
    let known = kind.map(|kind| [usize::from(kind.config_size())]);
    let sizes = known.as_ref().map_or(&CONFIG_SIZES[..], |size| &size[..]);
    for size in sizes.iter().copied().filter(|size| *size > 0) {
        match session.read_config(size) {
            Ok(bytes) => {
                if bytes.len() < size {
                    quirks
                        .push(format!("gives {} bytes of configuration when asked for {size}", bytes.len()));
                }
                return Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect());
            }
            Err(error) if matches!(error.cause(), Cause::Refused(_)) => {
                quirks.push(format!("refuses to give {size} bytes of configuration"));
            }
            Err(error) => {
                quirks.push(format!("offers CONFIG and fails when asked for {size} bytes: {error}"));
                if kind.is_none() {
                    quirks.push(
                        "may be asked for the configuration of its own type alone, by --type".to_owned(),
                    );
                }
                return None;
            }
        }
    }
    None
}

/// Notes properties of the offer that will cause trouble.
fn notice(device: DeviceFeatures, protocol: ProtocolFeatures, quirks: &mut Vec<String>) {
    let absent: [(bool, &str); 6] = [
        (!device.has(bit::VERSION_1), "is a legacy device: no driver of virtio 1.0 accepts it"),
        (!device.has(bit::PROTOCOL_FEATURES), "has no protocol features: its errors stay unheard"),
        (
            !protocol.contains(ProtocolFeatures::REPLY_ACK),
            "acknowledges nothing (no reply_ack): errors show late",
        ),
        (
            !protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD),
            "keeps no record of requests in flight (no inflight_shmfd): after a crash, rings restart from the used index",
        ),
        (
            !protocol.contains(ProtocolFeatures::LOG_SHMFD) || !device.has(bit::LOG_ALL),
            "logs no writes (log_shmfd and log_all): its device cannot migrate live",
        ),
        (
            protocol.contains(ProtocolFeatures::HOST_NOTIFIER)
                && !protocol.contains(ProtocolFeatures::BACKEND_REQ),
            "offers host_notifier without the channel that it needs",
        ),
    ];
    quirks.extend(absent.into_iter().filter(|(is, _)| *is).map(|(_, what)| what.to_owned()));
}

/// Runs `outboard probe vhost-user SOCKET [--type TYPE] [--json]`.
///
/// # Errors
/// The errors of [`vhost_user`], and a closed standard output.
pub fn command(
    socket: &Path,
    limits: &Limits,
    device: Option<DeviceType>,
    json: bool,
) -> Result<ExitCode, Error> {
    let report = vhost_user(socket, limits, device)?;
    crate::tools::print(&report, if json { None } else { Some(describe(&report)) })?;
    Ok(ExitCode::SUCCESS)
}

fn describe(report: &VhostUserReport) -> String {
    let mut text = format!("vhost-user backend {}\n", report.socket);
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        writeln!(text, "  {name:<18} {value}").unwrap_or_default();
    };
    line("features", &format!("{} {}", report.features, report.feature_names.join(" ")));
    line(
        "protocol features",
        &format!("{} {}", report.protocol_features, report.protocol_feature_names.join(" ")),
    );
    line("queues", &report.queues.map_or("not told".to_owned(), |queues| queues.to_string()));
    line("configuration", report.config.as_deref().unwrap_or("none"));
    for (index, size) in report.shared_memory.iter().enumerate() {
        line("shared memory", &format!("region {index}: {size:#x} bytes"));
    }
    for quirk in &report.quirks {
        line("note", quirk);
    }
    text
}
