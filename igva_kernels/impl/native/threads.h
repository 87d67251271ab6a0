/* Work that is spread over threads. */

#include <pthread.h>
#include <signal.h>

typedef void (*work)(void *job, int64_t worker);

/* Those of the program's OpenMP runtime, where it is known (openmp.py): beside threads that wait actively no core is idle.
 * A forked child has none of its parent's threads, and the runtime does not know it. */
static void (*team)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

struct shared {
    work run;
    void *job;
    int64_t next_worker;
};

static void join_team(void *data)
{
    struct shared *shared = data;
    shared->run(shared->job, __atomic_fetch_add(&shared->next_worker, 1, __ATOMIC_RELAXED));
}

/* Else a pool that outlives the calls: waking a thread takes 5 microseconds, creating one 50 and a wait for a free core.
 * One caller at a time has it; another that comes meanwhile works alone, which is right as well, since the cores are taken. */

struct pool {
    pthread_mutex_t caller, lock;
    pthread_cond_t wake, idle;
    int64_t threads, openings, running, next_worker;
    work run;
    void *job;
};

#define EMPTY_POOL                                                                                                            \
    {                                                                                                                         \
        .caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER,             \
        .idle = PTHREAD_COND_INITIALIZER                                                                                      \
    }

static struct pool pool = EMPTY_POOL;
static pthread_once_t fork_handler = PTHREAD_ONCE_INIT;

static void forget_threads(void)
{
    const struct pool empty = EMPTY_POOL;
    pool = empty;
    team = NULL;
}

static void install_fork_handler(void) { pthread_atfork(NULL, NULL, forget_threads); }

/* The runtime's entry point; null for a pool of our own. */
void igva_use_team(void *parallel)
{
    pthread_once(&fork_handler, install_fork_handler);
    memcpy(&team, &parallel, sizeof team);
}

static void *serve(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.openings == 0) pthread_cond_wait(&pool.wake, &pool.lock);
        pool.openings--;
        pool.running++;
        const int64_t worker = pool.next_worker++;
        const work run = pool.run;
        void *const job = pool.job;
        pthread_mutex_unlock(&pool.lock);
        run(job, worker);
        pthread_mutex_lock(&pool.lock);
        if (--pool.running == 0) pthread_cond_signal(&pool.idle);
    }
    return NULL;
}

/* Threads up to ``wanted``; fewer where the system gives no more. The lock is held. */
static void grow_pool(int64_t wanted)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    if (pool.threads >= wanted) return;
    sigfillset(&all); /* signals are for the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.threads < wanted && pthread_create(&thread, &attributes, serve, NULL) == 0) pool.threads++;
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Run the work on the caller's thread, as worker 0, and on up to ``threads`` - 1 others; return when all have finished. */
static void run_on(int64_t threads, work run, void *job)
{
    if (threads < 2) {
        run(job, 0);
        return;
    }
    if (team) {
        struct shared shared = {run, job, 0};
        team(join_team, &shared, (unsigned)threads, 0);
        return;
    }
    pthread_once(&fork_handler, install_fork_handler);
    if (pthread_mutex_trylock(&pool.caller) != 0) {
        run(job, 0);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    grow_pool(threads - 1);
    pool.run = run;
    pool.job = job;
    pool.next_worker = 1;
    pool.openings = threads - 1 < pool.threads ? threads - 1 : pool.threads;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    run(job, 0);
    pthread_mutex_lock(&pool.lock);
    pool.openings = 0; /* whoever has not begun by now finds nothing left to do */
    while (pool.running > 0) pthread_cond_wait(&pool.idle, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.caller);
}

/* The next run of chunks for a thread: half of its share of what is left, so that the last ones are short. */
static int take(int64_t *next, int64_t total, int64_t threads, int64_t *begin, int64_t *end)
{
    int64_t at = __atomic_load_n(next, __ATOMIC_RELAXED);
    do {
        if (at >= total) return 0;
        const int64_t run = (total - at) / (2 * threads);
        *begin = at;
        *end = at + (run > 1 ? run : 1);
    } while (!__atomic_compare_exchange_n(next, &at, *end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return 1;
}
