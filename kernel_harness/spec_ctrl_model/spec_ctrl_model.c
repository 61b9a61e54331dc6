// SPDX-License-Identifier: GPL-2.0-only
/*
 * Gives the msr driver of a running kernel an MSR of our design.
 *
 * /dev/cpu/N/msr (arch/x86/kernel/msr.c) reads and writes with rdmsr_safe_on_cpu() and wrmsr_safe_on_cpu() in 5.10, 6.1
 * and 6.12, with rdmsrq_safe_on_cpu() and wrmsrq_safe_on_cpu() in 7.2. A kprobe at their entry looks at the MSR's
 * index; for the modelled one it sends the caller to a function of this module with the same signature, for every other
 * it does nothing. The driver itself, with its lockdown, allow_writes, taint and partial transfers, is the kernel's own.
 * No register of the CPU is touched.
 *
 * The kernel's own accesses (native_wrmsr and such) and the driver's ioctls are not modelled.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/delay.h>
#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/percpu.h>
#include <linux/proc_fs.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <asm/cpufeature.h>
#include <asm/processor.h>

#define MODEL_CPUS 64	/* CPUs that can have values of their own; later ones are like the last */
#define LOG_ENTRIES 4096

/* <linux/fs.h> has a function with the name that module_param_array() would give its type check for "sticky". */
#define __check_sticky __check_model_sticky

/* Element n is CPU n's; CPUs beyond the last element given are like that one. */
#define MODEL_PARAM(name, ctype, type, text)				\
	static ctype name[MODEL_CPUS];					\
	static unsigned int name##_count;				\
	module_param_array(name, type, &name##_count, 0444);		\
	MODULE_PARM_DESC(name, text " (a list: one per CPU, the last for the rest)")

MODEL_PARAM(initial, unsigned long long, ullong, "value after boot and after a CPU came online, default 0");
MODEL_PARAM(valid, unsigned long long, ullong, "bits that may be set; a write of any other faults, default 0x7");
MODEL_PARAM(dropped, unsigned long long, ullong, "bits that may be written but stay 0");
MODEL_PARAM(sticky, unsigned long long, ullong, "bits that stay 1 once they are");
MODEL_PARAM(unreadable, unsigned long long, ullong, "bits that hold their value but read 0");
MODEL_PARAM(rewrite_mask, unsigned long long, ullong, "bits that the kernel sets anew after each write");
MODEL_PARAM(rewrite_value, unsigned long long, ullong, "what it sets them to");
MODEL_PARAM(absent, bool, bool, "no such register: reads and writes fault");

static unsigned int msr = 0x48;
module_param(msr, uint, 0444);
MODULE_PARM_DESC(msr, "index of the MSR, default 0x48");

static unsigned int noise;
module_param(noise, uint, 0644);
MODULE_PARM_DESC(noise, "every Nth read of a CPU shows noise_mask toggled; 0 for never");

static unsigned long long noise_mask = 1;
module_param(noise_mask, ullong, 0644);
MODULE_PARM_DESC(noise_mask, "the bits that noise toggles, default 0x1");

static unsigned int delay_us;
module_param(delay_us, uint, 0644);
MODULE_PARM_DESC(delay_us, "microseconds that each access takes");

static bool kvm_test;
module_param(kvm_test, bool, 0444);
MODULE_PARM_DESC(kvm_test, "also answer for the hardware when KVM tests a value (load kvm before)");

static unsigned long long kvm_valid;
module_param(kvm_valid, ullong, 0644);
MODULE_PARM_DESC(kvm_valid, "the bits that KVM's test accepts");

static bool v_spec_ctrl;
module_param(v_spec_ctrl, bool, 0444);
MODULE_PARM_DESC(v_spec_ctrl, "make the kernel believe in V_SPEC_CTRL (load kvm_amd after)");

/* CPUID 8000_000A EDX bit 20: X86_FEATURE_V_SPEC_CTRL in <asm/cpufeatures.h> since v5.13. */
#define FEATURE_V_SPEC_CTRL (15 * 32 + 20)

struct model {
	spinlock_t lock;	/* all below */
	u64 initial;
	u64 valid;
	u64 dropped;
	u64 sticky;
	u64 unreadable;
	u64 rewrite_mask;
	u64 rewrite_value;
	bool absent;
	u64 value;
	u64 cleared;		/* bits of initial that were 0 after any write */
	u64 set;		/* bits that were 1 after any write */
	unsigned long reads;	/* attempts, as are writes */
	unsigned long writes;
	unsigned long faults;	/* of the writes */
};

struct log_entry {
	unsigned int cpu;
	pid_t pid;
	u64 value;
	int result;
};

static DEFINE_PER_CPU(struct model, models);
static DEFINE_SPINLOCK(log_lock);
static struct log_entry write_log[LOG_ENTRIES];
static unsigned long log_next;

static void log_write(unsigned int cpu, u64 value, int result)
{
	struct log_entry *entry;

	spin_lock(&log_lock);
	entry = &write_log[log_next++ % LOG_ENTRIES];
	entry->cpu = cpu;
	entry->pid = task_tgid_nr(current);
	entry->value = value;
	entry->result = result;
	spin_unlock(&log_lock);
}

static int model_read(unsigned int cpu, u64 *value)
{
	struct model *m = per_cpu_ptr(&models, cpu);
	int result = 0;

	if (delay_us)
		fsleep(delay_us);

	spin_lock(&m->lock);
	if (!cpu_online(cpu)) {
		result = -ENXIO;	/* as smp_call_function_single() */
		goto out;
	}
	m->reads++;
	if (m->absent) {
		result = -EIO;		/* as rdmsr_safe() */
		goto out;
	}
	*value = m->value & ~m->unreadable;
	if (noise && m->reads % noise == 0)
		*value ^= noise_mask;
out:
	spin_unlock(&m->lock);
	return result;
}

static int model_write(unsigned int cpu, u64 value)
{
	struct model *m = per_cpu_ptr(&models, cpu);
	int result = 0;

	if (delay_us)
		fsleep(delay_us);

	spin_lock(&m->lock);
	if (!cpu_online(cpu)) {
		result = -ENXIO;
		goto out;
	}
	m->writes++;
	if (m->absent || (value & ~m->valid)) {
		m->faults++;
		result = -EIO;		/* as wrmsr_safe() */
	} else {
		m->value = (value & ~m->dropped) | (m->value & m->sticky);
		m->value = (m->value & ~m->rewrite_mask) | (m->rewrite_value & m->rewrite_mask);
		m->cleared |= m->initial & ~m->value;
		m->set |= m->value;
	}
	log_write(cpu, value, result);
out:
	spin_unlock(&m->lock);
	return result;
}

/*
 * What the driver's calls land in. The pre-handler took a reference to the module, so that it cannot go away while a
 * reader sleeps here.
 */
static noinline int enter_rdmsr(unsigned int cpu, u32 index, u32 *low, u32 *high)
{
	u64 value = 0;
	int result = model_read(cpu, &value);

	*low = lower_32_bits(value);
	*high = upper_32_bits(value);
	module_put(THIS_MODULE);
	return result;
}

static noinline int enter_wrmsr(unsigned int cpu, u32 index, u32 low, u32 high)
{
	int result = model_write(cpu, (u64)high << 32 | low);

	module_put(THIS_MODULE);
	return result;
}

static noinline int enter_rdmsrq(unsigned int cpu, u32 index, u64 *value)
{
	u64 read = 0;
	int result = model_read(cpu, &read);

	*value = read;
	module_put(THIS_MODULE);
	return result;
}

static noinline int enter_wrmsrq(unsigned int cpu, u32 index, u64 value)
{
	int result = model_write(cpu, value);

	module_put(THIS_MODULE);
	return result;
}

/* kvm_spec_ctrl_test_value(): 0 if the hardware takes the value, 1 if it takes #GP. */
static noinline int enter_kvm_test(u64 value)
{
	int result = value & ~kvm_valid ? 1 : 0;

	module_put(THIS_MODULE);
	return result;
}

struct hook {
	struct kprobe probe;
	void *target;
	bool write;
	bool kvm;	/* KVM's test of a value: its only argument is the value */
	bool registered;
};

static int divert(struct kprobe *probe, struct pt_regs *regs)
{
	struct hook *hook = container_of(probe, struct hook, probe);

	/* All four functions have the CPU as first argument and the index as second. */
	if (!hook->kvm && ((u32)regs->si != msr || (u32)regs->di >= nr_cpu_ids || !cpu_possible((u32)regs->di)))
		return 0;
	if (!try_module_get(THIS_MODULE))	/* on its way out */
		return 0;
	instruction_pointer_set(regs, (unsigned long)hook->target);
	return 1;
}
NOKPROBE_SYMBOL(divert);

static void keep_unoptimised(struct kprobe *probe, struct pt_regs *regs, unsigned long flags)
{
}

static struct hook hooks[] = {
	{ .probe.symbol_name = "rdmsr_safe_on_cpu", .target = enter_rdmsr },
	{ .probe.symbol_name = "wrmsr_safe_on_cpu", .target = enter_wrmsr, .write = true },
	/* what the driver of 7.2 calls; absent from 6.12 */
	{ .probe.symbol_name = "rdmsrq_safe_on_cpu", .target = enter_rdmsrq },
	{ .probe.symbol_name = "wrmsrq_safe_on_cpu", .target = enter_wrmsrq, .write = true },
	/* kvm.ko, which has to be there before; Linux commit 841c2be09fe4 (in v5.9) */
	{ .probe.symbol_name = "kvm_spec_ctrl_test_value", .target = enter_kvm_test, .kvm = true },
};

/*
 * A pre-handler may change the instruction pointer if the probe sits on ftrace and has no post-handler
 * (kprobe_ipmodify_ops), or if it is a breakpoint that is not replaced by a jump, which a post-handler prevents.
 */
static int hook_register(struct hook *hook)
{
	const char *name = hook->probe.symbol_name;
	int error;

	hook->probe.pre_handler = divert;
	error = register_kprobe(&hook->probe);
	if (!error && !(hook->probe.flags & KPROBE_FLAG_FTRACE)) {
		unregister_kprobe(&hook->probe);
		memset(&hook->probe, 0, sizeof(hook->probe));
		hook->probe.symbol_name = name;
		hook->probe.pre_handler = divert;
		hook->probe.post_handler = keep_unoptimised;
		error = register_kprobe(&hook->probe);
	}
	hook->registered = !error;
	return error;
}

static void hooks_unregister(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(hooks); i++) {
		if (hooks[i].registered)
			unregister_kprobe(&hooks[i].probe);
		hooks[i].registered = false;
	}
}

static int hooks_register(void)
{
	bool reads = false, writes = false;
	unsigned int i;
	int error;

	for (i = 0; i < ARRAY_SIZE(hooks); i++) {
		if (hooks[i].kvm && !kvm_test)
			continue;
		error = hook_register(&hooks[i]);
		if (error == -ENOENT && !hooks[i].kvm)	/* not in this kernel */
			continue;
		if (error) {
			pr_err("cannot probe %s: error %d\n", hooks[i].probe.symbol_name, error);
			hooks_unregister();
			return error;
		}
		if (hooks[i].write)
			writes = true;
		else if (!hooks[i].kvm)
			reads = true;
	}
	if (reads && writes)
		return 0;
	pr_err("this kernel has no function that the msr driver is known to call\n");
	hooks_unregister();
	return -ENOENT;
}

static int model_online(unsigned int cpu)
{
	struct model *m = per_cpu_ptr(&models, cpu);

	spin_lock(&m->lock);
	m->value = m->initial;	/* as x86_spec_ctrl_setup_ap() does for the real one */
	spin_unlock(&m->lock);
	return 0;
}

static int model_show(struct seq_file *file, void *unused)
{
	unsigned long seq, first;
	unsigned int cpu;

	for_each_possible_cpu(cpu) {
		struct model *m = per_cpu_ptr(&models, cpu), now;

		spin_lock(&m->lock);
		now = *m;
		spin_unlock(&m->lock);
		seq_printf(file,
			   "cpu %u online %d value 0x%016llx initial 0x%016llx reads %lu writes %lu faults %lu cleared 0x%016llx set 0x%016llx\n",
			   cpu, cpu_online(cpu), now.value, now.initial, now.reads, now.writes, now.faults,
			   now.cleared, now.set);
	}

	spin_lock(&log_lock);
	first = log_next > LOG_ENTRIES ? log_next - LOG_ENTRIES : 0;
	for (seq = first; seq < log_next; seq++) {
		struct log_entry *entry = &write_log[seq % LOG_ENTRIES];

		seq_printf(file, "write %lu cpu %u pid %d value 0x%016llx result %d\n",
			   seq, entry->cpu, entry->pid, entry->value, entry->result);
	}
	spin_unlock(&log_lock);
	return 0;
}

static int model_open(struct inode *inode, struct file *file)
{
	/* Large enough from the start: the log is printed under a spinlock, and growing means printing again. */
	return single_open_size(file, model_show, NULL, 256 * nr_cpu_ids + 96 * LOG_ENTRIES);
}

/* "CPU VALUE": the kernel writes the register behind everyone's back; not counted, not checked. */
static ssize_t model_poke(struct file *file, const char __user *buffer, size_t size, loff_t *pos)
{
	char text[64];
	unsigned int cpu;
	unsigned long long value;

	if (size >= sizeof(text))
		return -EINVAL;
	if (copy_from_user(text, buffer, size))
		return -EFAULT;
	text[size] = '\0';
	if (sscanf(text, "%u %lli", &cpu, (long long *)&value) != 2)
		return -EINVAL;
	if (cpu >= nr_cpu_ids || !cpu_possible(cpu))
		return -ENXIO;
	spin_lock(&per_cpu_ptr(&models, cpu)->lock);
	per_cpu_ptr(&models, cpu)->value = value;
	spin_unlock(&per_cpu_ptr(&models, cpu)->lock);
	return size;
}

static const struct proc_ops model_proc_ops = {
	.proc_open = model_open,
	.proc_read = seq_read,
	.proc_write = model_poke,
	.proc_lseek = seq_lseek,
	.proc_release = single_release,
};

#define OF_CPU(name, cpu, otherwise) \
	(name##_count ? name[min_t(unsigned int, cpu, name##_count - 1)] : (otherwise))

static enum cpuhp_state hotplug_state;

static int __init model_init(void)
{
	unsigned int cpu;
	int error;

	for_each_possible_cpu(cpu) {
		struct model *m = per_cpu_ptr(&models, cpu);

		spin_lock_init(&m->lock);
		m->initial = OF_CPU(initial, cpu, 0);
		m->valid = OF_CPU(valid, cpu, 0x7);
		m->dropped = OF_CPU(dropped, cpu, 0);
		m->sticky = OF_CPU(sticky, cpu, 0);
		m->unreadable = OF_CPU(unreadable, cpu, 0);
		m->rewrite_mask = OF_CPU(rewrite_mask, cpu, 0);
		m->rewrite_value = OF_CPU(rewrite_value, cpu, 0);
		m->absent = OF_CPU(absent, cpu, false);
		m->value = m->initial;
	}

	error = cpuhp_setup_state_nocalls(CPUHP_AP_ONLINE_DYN, "x86/spec_ctrl_model:online", model_online, NULL);
	if (error < 0)
		return error;
	hotplug_state = error;

	if (!proc_create(KBUILD_MODNAME, 0600, NULL, &model_proc_ops)) {
		error = -ENOMEM;
		goto no_proc;
	}
	error = hooks_register();
	if (error)
		goto no_hooks;
	/* Modules are patched for the CPU's features when they are loaded, so kvm_amd has to come later. */
	if (v_spec_ctrl)
		set_cpu_cap(&boot_cpu_data, FEATURE_V_SPEC_CTRL);
	pr_info("MSR %#x is a model now\n", msr);
	return 0;

no_hooks:
	remove_proc_entry(KBUILD_MODNAME, NULL);
no_proc:
	cpuhp_remove_state_nocalls(hotplug_state);
	return error;
}

static void __exit model_exit(void)
{
	hooks_unregister();
	remove_proc_entry(KBUILD_MODNAME, NULL);
	cpuhp_remove_state_nocalls(hotplug_state);
	/* One who has put the module may not yet have returned from it. */
	synchronize_rcu_tasks();
}

module_init(model_init);
module_exit(model_exit);

MODULE_DESCRIPTION("An MSR of our design for the msr driver, to test its users");
MODULE_LICENSE("GPL");
