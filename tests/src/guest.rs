//! A stock Linux guest and the commands run in it, over its serial console as `resources/guest/init`
//! describes it.

use std::env;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::launch::{Ended, Launch, STEP, Vm};
use crate::place::Missing;

/// How long a guest may take until its init waits for commands.
const BOOT: Duration = Duration::from_secs(30);

/// Prints what a guest's kernel complains of: warnings with a backtrace, lost interrupts, errors of a disk.
pub const COMPLAINTS: &str = "dmesg | grep -A9 -e 'Call Trace' -e BUG: -e WARNING: -e 'nobody cared' -e 'I/O error' \
    -e lockup -e 'unchecked MSR' -e stall";

/// The form of a kernel image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As distributed.
    BzImage,
    /// The ELF image inside it.
    Elf,
}

/// A stock kernel and the initramfs for it.
#[derive(Clone, Debug)]
pub struct Kernel {
    name: String,
    image: PathBuf,
    initramfs: PathBuf,
}

impl Kernel {
    /// The Debian kernel of a series, such as `6.12`, by the variables that the lab sets.
    ///
    /// # Errors
    /// When the variables are not set, because the lab's runner did not start this test.
    pub fn stock(series: &str, form: Form) -> Result<Self, Missing> {
        let variable = |name: String| {
            let found = env::var_os(&name).map(PathBuf::from);
            found.ok_or_else(|| Missing::new(format!("{name} is not set: run by tests/lab/runner")))
        };
        let (number, suffix) = (series.replace('.', "_"), if form == Form::Elf { "ELF" } else { "BZIMAGE" });
        Ok(Self {
            name: format!("{series} {suffix}"),
            image: variable(format!("OUTBOARD_KERNEL_{number}_{suffix}"))?,
            initramfs: variable(format!("OUTBOARD_GUEST_INITRAMFS_{number}"))?,
        })
    }

    /// The one that most tests take: the newest, as ELF, which boots fastest.
    ///
    /// # Errors
    /// As [`Kernel::stock`].
    pub fn usual() -> Result<Self, Missing> {
        Self::stock("6.12", Form::Elf)
    }

    /// A machine about to boot it, with words added to its command line.
    #[must_use]
    pub fn launch(&self, words: &str) -> Launch {
        // `quiet`: each character of the boot log costs two exits, which are dear in the lab.
        let line = format!("console=ttyS0 quiet panic=-1 {words}");
        Launch::kernel(&self.image, &line).arg("--initramfs").arg(&self.initramfs)
    }

    /// A machine about to boot it and to wait for commands.
    #[must_use]
    pub fn guest(&self) -> Launch {
        self.launch("outboard.mode=exec")
    }

    /// A machine about to run a script in place of waiting for commands; its end ends the machine.
    ///
    /// # Panics
    /// When it is too long for a command line.
    #[must_use]
    pub fn script(&self, text: &str) -> Launch {
        self.launch(&Self::words(text))
    }

    /// What has the guest run a script: words of its command line.
    ///
    /// # Panics
    /// When it is too long for a command line.
    #[must_use]
    pub fn words(text: &str) -> String {
        let words = format!("outboard.run={}", base64(text.as_bytes()));
        // The kernel cuts longer lines off.
        assert!(words.len() < 1900, "{} bytes are too many for a command line", words.len());
        words
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A guest that waits for commands.
#[derive(Debug)]
pub struct Guest {
    vm: Vm,
    seen: usize,
    commands: u32,
}

/// What a command left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Its exit status.
    pub status: u8,
    /// Its output and errors.
    pub text: String,
}

impl Guest {
    /// Starts a machine made by [`Kernel::guest`] and waits for it.
    ///
    /// # Panics
    /// When the guest does not come up.
    #[must_use]
    pub fn boot(launch: Launch) -> Self {
        let mut guest = Self { vm: launch.start(), seen: 0, commands: 0 };
        guest.wait_ready();
        guest
    }

    /// Waits for the next boot of the same machine.
    ///
    /// # Panics
    /// When the guest does not come up.
    pub fn wait_ready(&mut self) {
        self.seen = self.find("@ready\n", BOOT);
    }

    /// Waits for the first process of the next boot, before it loads drivers.
    ///
    /// # Panics
    /// When the process does not start.
    pub fn wait_init(&mut self) {
        self.seen = self.find("@init", BOOT);
    }

    fn find(&self, wanted: &str, limit: Duration) -> usize {
        match self.vm.console().find(wanted, self.seen, limit) {
            Ok(end) => end,
            Err(why) => panic!("on the console {why}"),
        }
    }

    /// Sends a command and returns its number; [`Guest::finish`] waits for it.
    ///
    /// # Panics
    /// When the guest does not begin it.
    pub fn begin(&mut self, command: &str) -> u32 {
        self.commands += 1;
        let line = format!("@{} {}\n", self.commands, base64(command.as_bytes()));
        assert!(line.len() <= 4000, "too long for a line: {command}");
        self.vm.send(line.as_bytes());
        self.seen = self.find(&format!("@begin {}\n", self.commands), STEP);
        self.commands
    }

    /// Waits for the end of the command that was begun.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn finish(&mut self, number: u32, limit: Duration) -> Done {
        let (begin, mark) = (self.seen, format!("\n@end {number} "));
        let end = self.find(&mark, limit);
        self.seen = end;
        self.seen = self.find("\n", STEP);
        let text = self.vm.console().text_from(begin);
        let (text, status) = text.split_once(&mark).expect("found before");
        let status = status.lines().next().and_then(|status| status.parse().ok());
        Done { status: status.expect("@end has a status"), text: text.to_owned() }
    }

    /// Runs a command, whatever its status.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn exec(&mut self, command: &str, limit: Duration) -> Done {
        let number = self.begin(command);
        self.finish(number, limit)
    }

    /// Runs a command that must succeed and returns what it printed, trimmed.
    ///
    /// # Panics
    /// When it fails or does not end in time.
    pub fn run(&mut self, command: &str) -> String {
        let done = self.exec(command, STEP);
        assert_eq!(done.status, 0, "{command}: {}", done.text);
        done.text.trim().to_owned()
    }

    /// As [`Guest::run`], for a number.
    ///
    /// # Panics
    /// Also when it printed no number.
    pub fn number(&mut self, command: &str) -> u64 {
        let text = self.run(command);
        text.parse().unwrap_or_else(|_| panic!("{command}: no number but {text:?}"))
    }

    /// Sends a command that ends the machine or starts it anew.
    pub fn last_words(&mut self, command: &str) {
        self.begin(command);
    }

    /// The machine.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The machine, once there is nothing more to say to the guest.
    #[must_use]
    pub fn into_vm(self) -> Vm {
        self.vm
    }

    /// Powers the guest off and checks that all went well: exit code 0, no complaint of the kernel or of the
    /// VMM.
    ///
    /// # Panics
    /// When something did not.
    pub fn power_off(mut self) -> Ended {
        self.assert_kernel_is_content();
        self.last_words("poweroff -f");
        let ended = self.vm.end(STEP).with_code(0);
        assert_eq!(ended.stats().text("/end"), "power-off");
        assert!(
            !ended.log.contains("warn: ") && !ended.log.contains("error: "),
            "the VMM complains\n{ended}"
        );
        ended
    }

    /// No warnings with a backtrace, no lost interrupts, no errors of the disk.
    ///
    /// # Panics
    /// When the kernel log shows one.
    pub fn assert_kernel_is_content(&mut self) {
        let found = self.exec(COMPLAINTS, STEP).text;
        assert!(found.trim().is_empty(), "in the guest's kernel log:\n{found}");
    }
}

/// RFC 4648 §4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let three =
            chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let index = usize::try_from(three >> (18 - 6 * digit) & 63).unwrap();
            text.push(if digit <= chunk.len() { DIGITS[index].into() } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
