// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! In QEMU 11, whose device for tests can be of any type.

use std::io::Write;
use std::process::{Command, Stdio};

use vhost_device_tests::guest;
use vhost_device_tests::guest::Machine;
use vhost_device_tests::guest::qemu::NewQemu;

use crate::{Console, FUNCTIONS, LAST_LINE, LINES, agent, assert_complete, text};

/// The ports 0 and 1: two queues for each, and two for control.
const DEVICE: &str = "vhost-user-test-device-pci,virtio-id=3,num_vqs=6,config_size=12";

/// The kernel's messages also go to the port.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 console=hvc0 loglevel=8 printk.devkmsg=on panic=-1 random.trust_cpu=on mitigations=off tsc=reliable no_timer_check";

/// Returns what `sha256sum` prints for these bytes.
fn checksum(bytes: &[u8]) -> String {
    let mut sum = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    sum.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = sum.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn linux_in_qemu_has_a_console_and_an_agent() {
    let Some(qemu) = NewQemu::prepare_or_skip() else {
        return;
    };
    let program = guest::agent::prepare().unwrap();
    let program = program.to_str().unwrap();
    let named = format!("name={},unix=DIR/agent", agent::NAME);
    let directory = tempfile::tempdir().unwrap();
    let console = Console::start(directory, &["pty=DIR/port", &named], &[]);
    let mut client = console.open("port");
    client.resize(40, 100);

    let (command, name) = (agent::command(guest::agent::PROGRAM), agent::NAME);
    let script = format!(
        r#"{FUNCTIONS}
        await 'grep -q hvc0 /sys/class/tty/console/active'
        for line in $(seq {LINES}); do echo "line $line of the log" > /dev/kmsg; done
        echo '{LAST_LINE}' > /dev/kmsg
        dmesg > /tmp/log
        echo 1 > /proc/sys/kernel/printk
        sed 's/^/@log /' /tmp/log
        # The last one to close the terminal resets it.
        exec 3<> /dev/hvc0
        await '[ "$(stty size <&3)" = "40 100" ]'
        echo @resized
        named {name}
        {command} &
        stty raw -echo <&3
        echo ready >&3
        set -- $(dd bs=4k count=256 iflag=fullblock <&3 | sha256sum)
        echo "@pasted $1"
        read line <&3
        "#
    );
    let mut guest = Machine::new("console", script)
        .qemu(qemu)
        .module("virtio_console")
        .program(program)
        .vhost_user(DEVICE, &console.path("socket"))
        .argument("-append")
        .argument(KERNEL_COMMAND_LINE)
        .start()
        .unwrap();

    let output = client.wait_for(LAST_LINE);
    guest.wait("resized").unwrap();
    let release = agent::assert_answers(&mut console.connect("agent"), 1);
    assert!(release.starts_with("6."), "{release}");

    let pasted = text(1 << 20);
    client.wait_for("ready");
    client.send(&pasted);
    assert_eq!(guest.wait("pasted").unwrap(), checksum(&pasted));
    client.send("end\n");
    let written = guest.finish().unwrap();
    let log: Vec<&str> = written.values("log").collect();
    assert_complete(&output, &log.join("\n"));
}
