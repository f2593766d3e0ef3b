#include "syncer.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

#include "machine.h"

struct syncer {
	pthread_t thread;
	pthread_mutex_t mutex; /* guards what follows; held while files are synced, so that none is closed meanwhile */
	pthread_cond_t changed;
	struct synced *first;
	bool stop;
	long period_ns;
};

static void sync_now(struct synced *synced)
{
	/* What is written from here on makes it dirty again. */
	if (atomic_exchange(&synced->dirty, false) && machine_sync(synced->file) != 0)
		atomic_store(&synced->error, errno);
}

static void wait_a_period(struct syncer *syncer)
{
	struct timespec end;
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_nsec += syncer->period_ns;
	end.tv_sec += end.tv_nsec / 1000000000;
	end.tv_nsec %= 1000000000;
	while (!syncer->stop && pthread_cond_timedwait(&syncer->changed, &syncer->mutex, &end) == 0)
		;
}

static void *run(void *context)
{
	struct syncer *syncer = context;
	pthread_mutex_lock(&syncer->mutex);
	while (!syncer->stop) {
		while (!syncer->first && !syncer->stop)
			pthread_cond_wait(&syncer->changed, &syncer->mutex);
		wait_a_period(syncer);
		for (struct synced *synced = syncer->first; synced; synced = synced->next)
			sync_now(synced);
	}
	pthread_mutex_unlock(&syncer->mutex);
	return NULL;
}

/* Starts it with all signals blocked: they are for Mosquitto's own loop, which they interrupt. */
static int start_thread(struct syncer *syncer)
{
	sigset_t all, before;
	sigfillset(&all);
	int error = pthread_sigmask(SIG_SETMASK, &all, &before);
	if (error)
		return error;
	error = pthread_create(&syncer->thread, NULL, run, syncer);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return error;
}

struct syncer *syncer_start(unsigned period_ms)
{
	struct syncer *syncer = calloc(1, sizeof *syncer);
	if (!syncer)
		return NULL;
	syncer->period_ns = (long)period_ms * 1000000;
	pthread_condattr_t steady;
	pthread_condattr_init(&steady);
	pthread_condattr_setclock(&steady, CLOCK_MONOTONIC);
	pthread_mutex_init(&syncer->mutex, NULL);
	pthread_cond_init(&syncer->changed, &steady);
	pthread_condattr_destroy(&steady);
	int error = start_thread(syncer);
	if (error == 0)
		return syncer;
	pthread_cond_destroy(&syncer->changed);
	pthread_mutex_destroy(&syncer->mutex);
	free(syncer);
	errno = error;
	return NULL;
}

void syncer_stop(struct syncer *syncer)
{
	if (!syncer)
		return;
	pthread_mutex_lock(&syncer->mutex);
	syncer->stop = true;
	pthread_cond_signal(&syncer->changed);
	pthread_mutex_unlock(&syncer->mutex);
	pthread_join(syncer->thread, NULL);
	pthread_cond_destroy(&syncer->changed);
	pthread_mutex_destroy(&syncer->mutex);
	free(syncer);
}

void syncer_add(struct syncer *syncer, struct synced *synced, int file)
{
	pthread_mutex_lock(&syncer->mutex);
	synced->file = file;
	synced->next = syncer->first;
	syncer->first = synced;
	pthread_cond_signal(&syncer->changed);
	pthread_mutex_unlock(&syncer->mutex);
}

void syncer_remove(struct syncer *syncer, struct synced *synced)
{
	pthread_mutex_lock(&syncer->mutex);
	struct synced **at = &syncer->first;
	while (*at != synced)
		at = &(*at)->next;
	*at = synced->next;
	sync_now(synced);
	pthread_mutex_unlock(&syncer->mutex);
}
